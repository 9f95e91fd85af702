#include "half.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ggpass {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  const uint32_t quiet = exponent == 31 && mantissa != 0 ? 1u << 22 : 0;
  return bits_to_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13 | quiet);
}

uint16_t narrow(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more, and infinity
  if (magnitude < 0x38800000) {
    // Below the smallest normal: adding 1/2 makes the float addition itself round at 2^-24.
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000));
  }
  // Carries out of the mantissa lead to the next exponent, and from the largest one to infinity.
  const uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

#if defined(__x86_64__)

bool has_f16c() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return found;
}

__attribute__((target("avx,f16c"))) int64_t widen_vectors(const uint16_t *from, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow_vectors(const float *from, int64_t count, uint16_t *to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), halves);
  }
  return i;
}

#else

bool has_f16c() { return false; }
int64_t widen_vectors(const uint16_t *, int64_t, float *) { return 0; }
int64_t narrow_vectors(const float *, int64_t, uint16_t *) { return 0; }

#endif

}  // namespace

void half_to_float(const uint16_t *from, int64_t count, float *to) {
  for (int64_t i = has_f16c() ? widen_vectors(from, count, to) : 0; i < count; i++) to[i] = widen(from[i]);
}

void float_to_half(const float *from, int64_t count, uint16_t *to) {
  for (int64_t i = has_f16c() ? narrow_vectors(from, count, to) : 0; i < count; i++) to[i] = narrow(from[i]);
}

}  // namespace ggpass
