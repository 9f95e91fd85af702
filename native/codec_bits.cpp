// Exp-Golomb of order k: bits(v) = 2·floor(log2(v / 2^k + 1)) + 1 + k, most significant bit first.
//
// With m = v + 2^k of b bits: b - k - 1 zeros, then m in b bits.

#include "codec.h"

namespace {

constexpr int kMaxOrder = 32;
// m = v + 2^k stays below 2^63, so that a code word is at most 126 bits.
constexpr uint64_t kMaxValue = uint64_t{1} << 62;

inline int bit_length(uint64_t v) { return 64 - __builtin_clzll(v); }

struct BitWriter {
  uint8_t* p;
  uint8_t* const end;
  uint64_t pending = 0;
  int filled = 0;

  // At most 32 bits at a time.
  bool put(uint64_t value, int bits) {
    pending = pending << bits | value;
    filled += bits;
    while (filled >= 8) {
      if (p == end) return false;
      filled -= 8;
      *p++ = static_cast<uint8_t>(pending >> filled);
    }
    return true;
  }

  bool put_long(uint64_t value, int bits) {
    if (bits > 32) {
      if (!put(value >> 32, bits - 32)) return false;
      value &= 0xffffffffu;
      bits = 32;
    }
    return put(value, bits);
  }

  bool flush() { return filled == 0 || put(0, 8 - filled); }
};

struct BitReader {
  const uint8_t* const in;
  const uint64_t bits;
  uint64_t at = 0;

  // The next 57 bits or more at the top of a word, zeros behind the end.
  uint64_t peek() const {
    const uint64_t byte = at >> 3, left = (bits >> 3) - byte;
    uint64_t v = 0;
    if (left >= 8) {
      __builtin_memcpy(&v, in + byte, 8);
      v = __builtin_bswap64(v);
    } else {
      for (uint64_t i = 0; i < left; i++) v |= uint64_t{in[byte + i]} << (56 - 8 * i);
    }
    return v << (at & 7);
  }

  uint64_t take(int count) {
    uint64_t v = 0;
    if (count > 32) {
      v = peek() >> (64 - (count - 32));
      at += static_cast<uint64_t>(count) - 32;
      count = 32;
    }
    v = v << count | peek() >> (64 - count);
    at += static_cast<uint64_t>(count);
    return v;
  }
};

}  // namespace

// The sum of bits(v) over n values, or a Status where a value exceeds 2^62.
GGP_API int64_t ggp_exp_golomb_bits(const uint64_t* values, size_t n, int order) {
  if (order < 0 || order > kMaxOrder) return kArgument;
  uint64_t bits = 0;
  for (size_t i = 0; i < n; i++) {
    if (values[i] > kMaxValue) return kArgument;
    bits += static_cast<uint64_t>(2 * bit_length(values[i] + (uint64_t{1} << order)) - order - 1);
  }
  return static_cast<int64_t>(bits);
}

// Encode n values; the number of bytes written (the last one filled up with zero bits), or a Status.
GGP_API int64_t ggp_exp_golomb_encode(const uint64_t* values, size_t n, int order, uint8_t* out, size_t capacity) {
  if (order < 0 || order > kMaxOrder) return kArgument;
  BitWriter w{out, out + capacity};
  for (size_t i = 0; i < n; i++) {
    if (values[i] > kMaxValue) return kArgument;
    const uint64_t m = values[i] + (uint64_t{1} << order);
    const int length = bit_length(m);
    if (!w.put_long(0, length - order - 1) || !w.put_long(m, length)) return kNoSpace;
  }
  if (!w.flush()) return kNoSpace;
  return w.p - out;
}

// Decode n values; the number of bytes they took, or a Status. The bits that fill up the last byte must be zero.
GGP_API int64_t ggp_exp_golomb_decode(const uint8_t* in, size_t length, size_t n, int order, uint64_t* out) {
  if (order < 0 || order > kMaxOrder || length > SIZE_MAX / 8) return kArgument;
  BitReader r{in, uint64_t{length} * 8};
  for (size_t i = 0; i < n; i++) {
    int zeros = 0;
    for (;;) {
      const uint64_t ahead = r.peek();
      const uint64_t left = r.bits - r.at;
      const int run = ahead ? __builtin_clzll(ahead) : 56;
      if (static_cast<uint64_t>(run) >= left) return kTruncated;
      zeros += run;
      r.at += static_cast<uint64_t>(run);
      if (zeros + order > 62) return kCorrupt;
      if (ahead) break;
    }
    const int count = zeros + order + 1;
    if (static_cast<uint64_t>(count) > r.bits - r.at) return kTruncated;
    out[i] = r.take(count) - (uint64_t{1} << order);
  }
  const int spare = static_cast<int>((8 - (r.at & 7)) & 7);
  if (spare && r.take(spare) != 0) return kCorrupt;
  return static_cast<int64_t>(r.at >> 3);
}
