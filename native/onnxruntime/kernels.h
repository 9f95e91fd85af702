// The generated kernels: their calling convention, and the tables that generate.py writes, one for each
// instruction set.
#pragma once

#include <cstdint>

namespace ggpass {

// The ABI of DLPack and of TVM's functions, of which all arguments here are tensors.
struct DLTensor {
  const void *data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape;
  const int64_t *strides;
  uint64_t byte_offset;
};

struct Any {
  int32_t type;
  uint32_t padding;
  const DLTensor *tensor;
};

extern "C" typedef int Generated(void *, const Any *arguments, int32_t count, Any *result);

// How codes become weights: bit arithmetic on canonical RF8 codes, int8(code) times a unit, or any 256 values.
enum Kind : int { kRf8 = 0, kLinear = 1, kTable = 2 };

// The kernel of y = x Wᵀ for up to `last` rows of x; it packs `width` of them side by side.
struct Range {
  int64_t last;
  int64_t width;
  Generated *run;
};

struct Decoder {
  Range ranges[12];  // ascending; the last one that is used reaches INT64_MAX
  Generated *dequantize;
  Generated *embedding;
};

struct Isa {
  const char *name;
  Decoder decoder[3];
};

// Kernels read codes by cache lines, so K is at least this.
constexpr int64_t kLine = 64;

// The best of this machine, or the one that ggpass_onnxruntime_use_isa named.
const Isa &isa();

}  // namespace ggpass
