// Interleaved rANS, AVX2: 32 symbols a round in four registers of eight lanes, chosen at run time.
//
// The lanes that need a word get it by one permutation of the next eight words, looked up by the mask of those lanes
// (F. Giesen's ryg_rans, public domain, has the same step in SSE4.1). Table entries come by eight scalar loads: the gather
// instruction is microcode on AMD (39 operations on Zen 3, where this is a third faster) and slowed down by the
// mitigation of Gather Data Sampling on Intel.

#include "codec_rans.h"

#if GGP_X86
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,popcnt")))

namespace {

// spread[mask][lane] = the number of set bits of mask below lane: which of the next words the lane takes.
struct Spread {
  uint64_t bytes[256];
  constexpr Spread() : bytes() {
    for (int mask = 0; mask < 256; mask++)
      for (int lane = 0, taken = 0; lane < 8; lane++) {
        bytes[mask] |= uint64_t(taken) << (8 * lane);
        taken += mask >> lane & 1;
      }
  }
};
constexpr Spread kSpread;

struct alignas(32) Slots {
  uint32_t at[8];
};

AVX2 inline __m256i entries(const uint32_t* t, const Slots& s) {
  __m128i low = _mm_cvtsi32_si128(static_cast<int>(t[s.at[0]]));
  __m128i high = _mm_cvtsi32_si128(static_cast<int>(t[s.at[4]]));
  low = _mm_insert_epi32(low, static_cast<int>(t[s.at[1]]), 1);
  high = _mm_insert_epi32(high, static_cast<int>(t[s.at[5]]), 1);
  low = _mm_insert_epi32(low, static_cast<int>(t[s.at[2]]), 2);
  high = _mm_insert_epi32(high, static_cast<int>(t[s.at[6]]), 2);
  low = _mm_insert_epi32(low, static_cast<int>(t[s.at[3]]), 3);
  high = _mm_insert_epi32(high, static_cast<int>(t[s.at[7]]), 3);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

AVX2 inline __m256i symbols(const uint16_t* t, const Slots& s) {
  __m128i v = _mm_cvtsi32_si128(t[s.at[0]]);
  v = _mm_insert_epi16(v, t[s.at[1]], 1);
  v = _mm_insert_epi16(v, t[s.at[2]], 2);
  v = _mm_insert_epi16(v, t[s.at[3]], 3);
  v = _mm_insert_epi16(v, t[s.at[4]], 4);
  v = _mm_insert_epi16(v, t[s.at[5]], 5);
  v = _mm_insert_epi16(v, t[s.at[6]], 6);
  v = _mm_insert_epi16(v, t[s.at[7]], 7);
  return _mm256_cvtepu16_epi32(v);
}

// What eight lanes decoded: their symbols, one in each 32-bit element.
template <bool packed>
AVX2 inline __m256i step(__m256i& x, const uint8_t*& p, const RansTable& t, __m256i mask, __m128i bits) {
  Slots slots;
  _mm256_store_si256(reinterpret_cast<__m256i*>(slots.at), _mm256_and_si256(x, mask));
  const __m256i entry = entries(t.slots, slots);
  __m256i freq, bias, symbol;
  if (packed) {
    freq = _mm256_srli_epi32(entry, 20);
    bias = _mm256_and_si256(_mm256_srli_epi32(entry, 8), _mm256_set1_epi32(4095));
    symbol = _mm256_and_si256(entry, _mm256_set1_epi32(255));
  } else {
    freq = _mm256_srli_epi32(entry, 16);
    bias = _mm256_and_si256(entry, _mm256_set1_epi32(65535));
    symbol = symbols(t.symbols(), slots);
  }
  x = _mm256_add_epi32(_mm256_mullo_epi32(freq, _mm256_srl_epi32(x, bits)), bias);
  const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
  const unsigned need = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
  const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kSpread.bytes[need])));
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i longer = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(words, order));
  x = _mm256_blendv_epi8(x, longer, low);
  p += 2 * _mm_popcnt_u32(need);
  return symbol;
}

AVX2 inline void store(uint8_t* out, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i words = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(words, order));
}

AVX2 inline void store(uint16_t* out, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_packus_epi32(c, d), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), high);
}

template <bool packed, class Out>
AVX2 size_t rounds(RansDecoder& d, const RansTable& t, Out* out, size_t n) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(t.mask()));
  const __m128i bits = _mm_cvtsi32_si128(static_cast<int>(t.bits));
  __m256i* const lanes = reinterpret_cast<__m256i*>(d.x);
  __m256i x0 = _mm256_loadu_si256(lanes), x1 = _mm256_loadu_si256(lanes + 1);
  __m256i x2 = _mm256_loadu_si256(lanes + 2), x3 = _mm256_loadu_si256(lanes + 3);
  const uint8_t* p = d.next;
  size_t done = 0;
  // Each step loads 16 bytes at p and takes at most as many, so a round stays within kRoundBytes.
  for (; n - done >= kLanes && d.end - p >= kRoundBytes; done += kLanes) {
    const __m256i s0 = step<packed>(x0, p, t, mask, bits);
    const __m256i s1 = step<packed>(x1, p, t, mask, bits);
    const __m256i s2 = step<packed>(x2, p, t, mask, bits);
    const __m256i s3 = step<packed>(x3, p, t, mask, bits);
    store(out + done, s0, s1, s2, s3);
  }
  _mm256_storeu_si256(lanes, x0);
  _mm256_storeu_si256(lanes + 1, x1);
  _mm256_storeu_si256(lanes + 2, x2);
  _mm256_storeu_si256(lanes + 3, x3);
  d.next = p;
  return done;
}

}  // namespace

size_t rans_rounds_avx2(RansDecoder& d, const RansTable& t, uint8_t* out, size_t n) {
  return t.packed ? rounds<true>(d, t, out, n) : rounds<false>(d, t, out, n);
}

size_t rans_rounds_avx2(RansDecoder& d, const RansTable& t, uint16_t* out, size_t n) {
  return t.packed ? rounds<true>(d, t, out, n) : rounds<false>(d, t, out, n);
}

#endif
