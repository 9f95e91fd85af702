// Exp-Golomb of order k: bits(v) = 2·floor(log2(v / 2^k + 1)) + 1 + k, most significant bit first; and patches,
// which are stored in it.
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

// The next number, or a Status.
int64_t next(BitReader& r, int order, uint64_t* out) {
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
  *out = r.take(count) - (uint64_t{1} << order);
  return *out <= kMaxValue ? kOk : kCorrupt;
}

// Whether the bits that fill up the last byte are zero, as the encoder left them; r.at then is a whole byte.
bool align(BitReader& r) {
  const int spare = static_cast<int>((8 - (r.at & 7)) & 7);
  return spare == 0 || r.take(spare) == 0;
}

int64_t unfold(uint64_t number) {
  const int64_t half = static_cast<int64_t>((number + 1) >> 1);
  return number & 1 ? half : -half;
}

template <class T>
bool store(T* out, int64_t value) {
  *out = static_cast<T>(value);
  // A uint64 above 2^63 has no code word, so a round trip through the type shows whether the value fits it.
  return static_cast<int64_t>(*out) == value && (static_cast<T>(-1) < T{0} || value >= 0);
}

bool store_typed(void* out, int type, size_t at, int64_t value) {
  switch (type) {
    case kU8: return store(static_cast<uint8_t*>(out) + at, value);
    case kI8: return store(static_cast<int8_t*>(out) + at, value);
    case kU16: return store(static_cast<uint16_t*>(out) + at, value);
    case kI16: return store(static_cast<int16_t*>(out) + at, value);
    case kU32: return store(static_cast<uint32_t*>(out) + at, value);
    case kI32: return store(static_cast<int32_t*>(out) + at, value);
    case kU64: return store(static_cast<uint64_t*>(out) + at, value);
    case kI64: return store(static_cast<int64_t*>(out) + at, value);
    default: return false;
  }
}

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
    const int64_t status = next(r, order, out + i);
    if (status < 0) return status;
  }
  if (!align(r)) return kCorrupt;
  return static_cast<int64_t>(r.at >> 3);
}

// Read the stored form of a model: count (2 bytes); then three sequences, each an order and exp-Golomb code words to
// whole bytes: the first value, folded; the gaps between values less 1; the frequencies less 1.
//
// `values` and `freq` hold `capacity` elements. The count, or a Status; whether the frequencies are a legal table is
// for ggp_rans_table to say.
GGP_API int64_t ggp_read_model(const uint8_t* in, size_t length, int64_t* values, uint32_t* freq, size_t capacity) {
  if (length < 3 || length > SIZE_MAX / 16) return kTruncated;
  const size_t count = in[0] | size_t{in[1]} << 8;
  if (count < 2 || count > capacity) return kCorrupt;
  size_t at = 2;
  for (int sequence = 0; sequence < 3; sequence++) {
    if (at >= length || in[at] > kMaxOrder) return kCorrupt;
    const int order = in[at++];
    BitReader r{in + at, uint64_t{length - at} * 8};
    const size_t n = sequence == 0 ? 1 : sequence == 1 ? count - 1 : count;
    for (size_t i = 0; i < n; i++) {
      uint64_t v;
      const int64_t status = next(r, order, &v);
      if (status < 0) return status;
      if (sequence == 0) {
        values[0] = unfold(v);
      } else if (sequence == 1) {
        // Both lie within 2^62, so the sum cannot overflow; what exceeds 2^62 is no symbol.
        values[i + 1] = values[i] + static_cast<int64_t>(v) + 1;
        if (values[i + 1] > static_cast<int64_t>(kMaxValue)) return kCorrupt;
      } else {
        if (v > 65535) return kCorrupt;
        freq[i] = static_cast<uint32_t>(v) + 1;
      }
    }
    if (!align(r)) return kCorrupt;
    at += static_cast<size_t>(r.at >> 3);
  }
  return at == length ? static_cast<int64_t>(count) : kCorrupt;
}

// Put patches in their places: out[position] = value, for `out` of n elements.
//
// Stored: their number (4 bytes); an order and the gaps between positions (exp-Golomb, to whole bytes); an order and
// the values, folded to 0, 1, 2, ... for 0, 1, -1, ... `substitutes`, for bytes or null: what a value decodes to, -1
// where it must not occur.
GGP_API int64_t ggp_patch(const uint8_t* in, size_t length, const int16_t* substitutes, int type, void* out, size_t n) {
  if (length < 6 || length > SIZE_MAX / 16) return kTruncated;
  uint32_t count;
  __builtin_memcpy(&count, in, 4);
  const int gap_order = in[4];
  if (count == 0 || count > n || gap_order > kMaxOrder) return kCorrupt;
  // The values start behind the gaps, so the gaps are read twice: first to find their end.
  BitReader gaps{in + 5, uint64_t{length - 5} * 8};
  uint64_t gap, position = 0;
  for (uint32_t i = 0; i < count; i++) {
    const int64_t status = next(gaps, gap_order, &gap);
    if (status < 0) return status;
    if (gap >= n || (position += gap + 1) > n) return kCorrupt;
  }
  if (!align(gaps)) return kCorrupt;
  const size_t at = 5 + static_cast<size_t>(gaps.at >> 3);
  if (at >= length || in[at] > kMaxOrder) return kCorrupt;
  const int value_order = in[at];
  BitReader values{in + at + 1, uint64_t{length - at - 1} * 8};
  gaps.at = 0;
  position = 0;
  for (uint32_t i = 0; i < count; i++) {
    uint64_t folded;
    int64_t status = next(gaps, gap_order, &gap);
    if (status < 0) return status;
    position += gap + 1;
    status = next(values, value_order, &folded);
    if (status < 0) return status;
    int64_t value = unfold(folded);
    if (substitutes) {
      if (value < 0 || value > 255 || substitutes[value] < 0) return kCorrupt;
      value = substitutes[value];
    }
    if (!store_typed(out, type, static_cast<size_t>(position - 1), value)) return kCorrupt;
  }
  if (!align(values) || values.at != values.bits) return kCorrupt;
  return kOk;
}
