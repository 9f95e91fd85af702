// The optional bias of a product.
#pragma once

#include "buffer.h"
#include "half.h"
#include "tensor.h"

namespace ggpass {

// The bias as float32 in `room` or where it lies; null where it is not given. Fails unless it has `rows` values.
inline const float *read_bias(const Tensor &bias, int64_t rows, Buffer<float> &room) {
  if (!bias.given()) return nullptr;
  if (bias.shape != Shape{rows})
    fail("bias is %s; it is (%lld)", text(bias.shape).c_str(), static_cast<long long>(rows));
  if (bias.element == ORT_FLOAT) return static_cast<const float *>(bias.data);
  half_to_float(static_cast<const uint16_t *>(bias.data), rows, room.at_least(rows));
  return room.get();
}

}  // namespace ggpass
