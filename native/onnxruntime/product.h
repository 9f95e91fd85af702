// y = x Wᵀ + bias with weights that stay codes.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "parallel.h"
#include "weights.h"

namespace ggpass {

class Product {
 public:
  // `bias` has as many values as there are rows of codes, or is null.
  Product(const Weights &weights, const float *bias, Session &session);

  // y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]; x is (m, K) and y (m, N), both contiguous.
  void run(const float *x, int64_t m, float *y);

  // How many rows of x to hand over at a time where they must be prepared anyway: enough to pay for decoding the
  // weights once, and few enough that workspaces stay some megabytes.
  int64_t block() const;

 private:
  void run_block(const float *x, int64_t m, float *y);

  Weights weights_;
  const float *bias_;
  Session &session_;
  int64_t columns_;               // of x, and of the codes in the file
  Buffer<uint8_t> padded_codes_;  // where rows are shorter than the line that kernels read
  Buffer<float> padded_x_;
  Buffer<float> packed_;
};

// out[i, :] = w[row_of(i), :], all K of each: rows ids[0..count), or `first` and on where ids is null.
void decode_rows(const Weights &weights, const int64_t *ids, int64_t first, int64_t count, float *out,
                 Session &session);

}  // namespace ggpass
