#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "run.h"

namespace ggpass {
namespace {

constexpr int64_t kWorkspaceFloats = 1 << 20;
constexpr int64_t kMostRows = 256;
constexpr int64_t kRowsStep = 16;  // a whole number of panels in every instruction set but AVX-512, where it is half

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A code to pad rows with. It meets activations of zero, so any finite value is as good as zero.
uint8_t harmless_code(const Weights &weights) {
  for (int code = 0; code < 256; code++)
    if (std::isfinite(weights.codebook[code])) return static_cast<uint8_t>(code);
  return 0;
}

}  // namespace

Product::Product(const Weights &weights, const float *bias, Session &session)
    : weights_(weights), bias_(bias), session_(session), columns_(weights.columns) {
  const int64_t k = columns_;
  if (k == 0 || k >= kLine) return;
  uint8_t *codes = padded_codes_.at_least(weights.rows * kLine);
  std::memset(codes, harmless_code(weights), static_cast<size_t>(weights.rows * kLine));
  for (int64_t n = 0; n < weights.rows; n++)
    std::memcpy(codes + n * kLine, weights.codes + n * k, static_cast<size_t>(k));
  weights_.codes = codes;
  weights_.columns = kLine;
}

int64_t Product::block() const {
  const int64_t rows = kWorkspaceFloats / std::max<int64_t>(weights_.columns, 1);
  return std::clamp(rows / kRowsStep * kRowsStep, kRowsStep, kMostRows);
}

void Product::run(const float *x, int64_t m, float *y) {
  const int64_t n = weights_.rows;
  if (m == 0 || n == 0) return;
  if (columns_ == 0) {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) y[i * n + j] = bias_ == nullptr ? 0 : bias_[j];
    return;
  }
  // Blocks of equal size: a small remainder would read all the weights again for little.
  const int64_t blocks = (m + block() - 1) / block();
  const int64_t size = round_up((m + blocks - 1) / blocks, kRowsStep);
  for (int64_t first = 0; first < m; first += size)
    run_block(x + first * columns_, std::min(size, m - first), y + first * n);
}

void Product::run_block(const float *x, int64_t m, float *y) {
  const int64_t n = weights_.rows, k = weights_.columns;
  if (columns_ < kLine) {
    float *wide = padded_x_.at_least(m * kLine);
    std::memset(wide, 0, static_cast<size_t>(m * kLine) * sizeof(float));
    for (int64_t i = 0; i < m; i++)
      std::memcpy(wide + i * kLine, x + i * columns_, static_cast<size_t>(columns_) * sizeof(float));
    x = wide;
  }
  const Range *range = isa().decoder[weights_.kind].ranges;
  while (m > range->last) range++;
  const int64_t packed = round_up(m, range->width) * round_up(k, kLine);
  static const float zero = 0;
  session_.set_work(m * n * k);
  ggpass::run(range->run, {floats(x, m, k, k), floats(packed_.at_least(packed), packed), bytes(weights_.codes, n, k),
                           floats(weights_.scale, n, weights_.scale_step),
                           floats(bias_ == nullptr ? &zero : bias_, n, bias_ == nullptr ? 0 : 1),
                           floats(weights_.codebook, 256), floats(y, m, n, n)});
}

void decode_rows(const Weights &w, const int64_t *ids, int64_t first, int64_t count, float *out, Session &session) {
  const int64_t k = w.columns;
  if (count == 0 || k == 0) return;
  session.set_work(count * k);
  if (k < kLine) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = ids == nullptr ? first + i : ids[i];
      const float scale = w.scale[row * w.scale_step];
      for (int64_t j = 0; j < k; j++) out[i * k + j] = w.value(w.codes[row * k + j]) * scale;
    }
    return;
  }
  const Decoder &decoder = isa().decoder[w.kind];
  if (ids != nullptr) {
    run(decoder.embedding, {numbers(ids, count), bytes(w.codes, w.rows, k), floats(w.scale, w.rows, w.scale_step),
                            floats(w.codebook, 256), floats(out, count, k, k)});
    return;
  }
  const Weights part = w.slice(first, count);
  run(decoder.dequantize, {bytes(part.codes, count, k), floats(part.scale, count, part.scale_step),
                           floats(part.codebook, 256), floats(out, count, k, k)});
}

}  // namespace ggpass
