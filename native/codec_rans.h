// Interleaved rANS with a static table: what the encoder, the portable decoder and the AVX2 decoder share.
//
// A lane's state x lies in [2^16, 2^32). With slots M = 2^bits, a symbol s that owns slots [start, start + freq):
//   encode:  if x >= freq·2^(32 - bits), emit the low 16 bits and drop them;  x' = (x / freq)·M + x % freq + start
//   decode:  slot = x % M;  s = symbol[slot];  x' = freq·(x / M) + slot - start;  if x' < 2^16, append 16 bits
// (J. Duda, arXiv 1311.2540; 32 lanes over one stream of 16-bit words after F. Giesen, arXiv 1402.3392.)
//
// Stream: 32 states of 4 bytes, then the words in the order the decoder takes them: symbol i belongs to lane
// i % 32, and within one round of 32 symbols the lanes take their words in ascending order. Eight neighbouring
// lanes are one AVX2 register, so both decoders read the same words in the same order. All lanes start encoding at
// 2^16, hence a decoder that does not end there, at the last byte, has met a corrupt stream.

#ifndef GGPASS_CODEC_RANS_H
#define GGPASS_CODEC_RANS_H

#include "codec.h"

#include <cstring>

constexpr int kLanes = 32;
constexpr int kMinBits = 8;
constexpr int kMaxBits = 15;
constexpr uint32_t kLow = 1u << 16;
constexpr size_t kStateBytes = kLanes * sizeof(uint32_t);
// The most that one round of 32 symbols can take from the stream.
constexpr ptrdiff_t kRoundBytes = kLanes * sizeof(uint16_t);

// Up to 12 bits and 8-bit symbols, one 32-bit entry a slot holds everything: freq << 20 | (slot - start) << 8 | symbol.
// Larger tables hold freq << 16 | (slot - start), and the symbols beside them.
struct RansTable {
  uint32_t bits;
  uint32_t packed;
  uint32_t symbol_limit;  // every symbol is below it
  uint32_t reserved;
  uint32_t slots[1];  // 2^bits, then (not packed) 2^bits uint16 symbols

  uint32_t mask() const { return (1u << bits) - 1; }
  const uint16_t* symbols() const { return reinterpret_cast<const uint16_t*>(slots + (size_t{1} << bits)); }
};

struct RansDecoder {
  uint32_t x[kLanes];
  const uint8_t* next;
  const uint8_t* end;
};

inline uint32_t load16(const uint8_t* p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

// Decode whole rounds while the stream holds a full round's worth of words; the number of symbols decoded. The caller
// decodes the rest with every read checked.
size_t rans_rounds_avx2(RansDecoder& d, const RansTable& t, uint8_t* out, size_t n);
size_t rans_rounds_avx2(RansDecoder& d, const RansTable& t, uint16_t* out, size_t n);

#endif
