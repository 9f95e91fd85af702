#include "weights.h"

#include <cmath>
#include <cstring>
#include <utility>

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

WeightInputs::WeightInputs(Tensor codes, Tensor scale, Tensor codebook, std::optional<bool> canonical)
    : codes_(std::move(codes)), scale_(std::move(scale)), codebook_(std::move(codebook)), canonical_(canonical) {
  if (codes_.element != ORT_UINT8 || codes_.shape.size() != 2)
    fail("codes are %s %s; they are uint8 (N, K): export the model again with ggpass", name_of(codes_.element),
         text(codes_.shape).c_str());
  codes_.count();  // fails where it overflows
  const int64_t rows = codes_.shape[0];
  if (scale_.element != ORT_FLOAT || (scale_.shape != Shape{rows} && scale_.shape != Shape{1}))
    fail("scale is %s %s; for codes %s it is float (%lld) or (1)", name_of(scale_.element),
         text(scale_.shape).c_str(), text(codes_.shape).c_str(), static_cast<long long>(rows));
  if (codebook_.given() && (codebook_.element != ORT_FLOAT || codebook_.shape != Shape{kCodes}))
    fail("codebook is %s %s; it is float (256)", name_of(codebook_.element), text(codebook_.shape).c_str());
}

const float *WeightInputs::codebook() const {
  return codebook_.given() ? static_cast<const float *>(codebook_.data) : rf8_codebook();
}

bool WeightInputs::is_rf8() const {
  // RF8's operators have no codebook to compare; reading 1 KB that the codes have pushed out of the caches would show.
  if (codebook_.given() && std::memcmp(codebook(), rf8_codebook(), kCodes * sizeof(float)) != 0) return false;
  return canonical_.has_value() ? *canonical_ : canonical(static_cast<const uint8_t *>(codes_.data), codes_.count());
}

Weights WeightInputs::weights() {
  Weights w{kTable,
            static_cast<const uint8_t *>(codes_.data),
            codes_.shape[0],
            codes_.shape[1],
            static_cast<const float *>(scale_.data),
            scale_.shape[0] == 1 ? 0 : 1,
            codebook()};
  if (is_rf8()) {
    w.kind = kRf8;
  } else if (const float unit = linear_unit(w.codebook); unit > 0) {
    w.kind = kLinear;
    scaled_.assign(w.scale, w.scale + scale_.shape[0]);
    for (float &scale : scaled_) scale *= unit;
    w.scale = scaled_.data();
  }
  return w;
}

}  // namespace ggpass
