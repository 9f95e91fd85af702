// float16 <-> float32, rounded to nearest even: activations come in either, the kernels compute in float32.
#pragma once

#include <cstdint>

namespace ggpass {

void half_to_float(const uint16_t *from, int64_t count, float *to);
void float_to_half(const float *from, int64_t count, uint16_t *to);

}  // namespace ggpass
