// The weights of a node: codes, scales and the codebook that they index.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace ggpass {

// w[n, k] = codebook[codes[n, k]] · scale[n]: what a kernel of this kind reads, all of it borrowed.
struct Weights {
  Kind kind;
  const uint8_t *codes;
  int64_t rows, columns;
  const float *scale;
  int64_t scale_step;  // 0 where one scale serves all rows
  const float *codebook;

  // The value of a code, without its scale.
  float value(uint8_t code) const { return kind == kLinear ? static_cast<int8_t>(code) : codebook[code]; }

  // `count` rows from `first` on.
  Weights slice(int64_t first, int64_t count) const {
    return {kind, codes + first * columns, count, columns, scale + first * scale_step, scale_step, codebook};
  }
};

// The 256 values of RF8: (−1)^s · 2^(e − 15) · (1 + r), zero for e = 0.
const float *rf8_codebook();

// Are all codes such that the bit arithmetic decodes them? A code that an encoder never emits (fifteen more zeros,
// and (e, −1/4), which is (e − 1, +1/2) too) has a value all the same, and only the table knows it.
bool canonical(const uint8_t *codes, int64_t count);

// The input tensors of a node, checked and recognized.
class WeightInputs {
 public:
  // Fails unless codes are (N, K) uint8, scale (N) or (1) float, codebook (256) float (RF8's own where not given).
  // `canonical` tells what is known of the codes from an earlier look; without it RF8 codes are looked through.
  WeightInputs(Tensor codes, Tensor scale, Tensor codebook, std::optional<bool> canonical);

  const Shape &shape() const { return codes_.shape; }

  // Are these codes for the bit arithmetic of RF8?
  bool is_rf8() const;

  // Borrows from this object and from the tensors.
  Weights weights();

 private:
  const float *codebook() const;

  Tensor codes_, scale_, codebook_;
  std::optional<bool> canonical_;
  std::vector<float> scaled_;
};

}  // namespace ggpass
