#include "weights.h"

#include <cmath>
#include <cstring>

namespace ggpass {
namespace {

constexpr int64_t kCodes = 256;

// The unit u with codebook[c] = int8(c) · u for every c, up to the rounding of the values; 0 where there is none.
float linear_unit(const float *codebook) {
  const float unit = codebook[1];
  if (!(unit > 0)) return 0;
  for (int c = 0; c < kCodes; c++) {
    const double exact = static_cast<double>(static_cast<int8_t>(c)) * unit;
    if (!(std::fabs(codebook[c] - exact) <= std::fabs(exact) * 0x1p-23)) return 0;
  }
  return unit;
}

}  // namespace

const float *rf8_codebook() {
  static const auto table = [] {
    constexpr float residuals[] = {-1.f / 4, -1.f / 8, -1.f / 16, 0, 1.f / 16, 1.f / 8, 1.f / 4, 1.f / 2};
    struct {
      float of[kCodes];
    } values{};
    for (int c = 0; c < kCodes; c++) {
      const int exponent = c >> 3 & 15;
      const float magnitude = exponent == 0 ? 0 : std::ldexp(1 + residuals[c & 7], exponent - 15);
      values.of[c] = c < 128 || exponent == 0 ? magnitude : -magnitude;
    }
    return values;
  }();
  return table.of;
}

bool canonical(const uint8_t *codes, int64_t count) {
  // Blocks, so that the compiler vectorizes the inner loop and a bad file is known early.
  for (int64_t first = 0; first < count; first += 4096) {
    const int64_t last = first + 4096 < count ? first + 4096 : count;
    uint8_t alias = 0;
    for (int64_t i = first; i < last; i++) {
      const uint8_t c = codes[i];
      alias |= static_cast<uint8_t>((c & 0x78) == 0 && c != 0) | static_cast<uint8_t>((c & 7) == 0 && (c & 0x70) != 0);
    }
    if (alias != 0) return false;
  }
  return true;
}

WeightInputs::WeightInputs(const Tensor &codes, const Tensor &scale, const Tensor *codebook)
    : codes_(codes), scale_(scale), codebook_(rf8_codebook()) {
  if (codes.element != ORT_UINT8 || codes.shape.size() != 2)
    fail("codes are %s %s; they are uint8 (N, K): export the model again with ggpass", name_of(codes.element),
         text(codes.shape).c_str());
  codes.count();
  const int64_t rows = codes.shape[0];
  if (scale.element != ORT_FLOAT || scale.shape.size() != 1 || (scale.shape[0] != rows && scale.shape[0] != 1))
    fail("scale is %s %s; for codes %s it is float (%lld) or (1)", name_of(scale.element), text(scale.shape).c_str(),
         text(codes.shape).c_str(), static_cast<long long>(rows));
  if (codebook == nullptr) return;
  if (codebook->element != ORT_FLOAT || codebook->shape != Shape{kCodes})
    fail("codebook is %s %s; it is float (256)", name_of(codebook->element), text(codebook->shape).c_str());
  codebook_ = static_cast<const float *>(codebook->data);
}

Weights WeightInputs::weights(bool known_canonical) {
  Weights w{kTable,
            static_cast<const uint8_t *>(codes_.data),
            codes_.shape[0],
            codes_.shape[1],
            static_cast<const float *>(scale_.data),
            scale_.shape[0] == 1 ? 0 : 1,
            codebook_};
  if (codebook_ == rf8_codebook() || std::memcmp(codebook_, rf8_codebook(), kCodes * sizeof(float)) == 0) {
    if (known_canonical || canonical(w.codes, w.rows * w.columns)) w.kind = kRf8;
  } else if (const float unit = linear_unit(codebook_); unit > 0) {
    w.kind = kLinear;
    scaled_.assign(w.scale, w.scale + scale_.shape[0]);
    for (float &scale : scaled_) scale *= unit;
    w.scale = scaled_.data();
  }
  return w;
}

}  // namespace ggpass
