// Interleaved rANS, portable: tables, the encoder, and the decoder that defines what every decoder must answer.

#include "codec_rans.h"

GGP_API uint32_t ggp_crc32c(uint32_t seed, const uint8_t* bytes, size_t n, int portable);
GGP_API int64_t ggp_patch(const uint8_t* in, size_t length, const int16_t* substitutes, int type, void* out, size_t n);

namespace {

// What encoding one symbol takes; the division by freq is a multiplication by 2^64 / freq rounded up, which is exact
// for 32-bit states and frequencies below 2^16.
struct Step {
  uint64_t reciprocal;
  uint32_t limit;     // freq·2^(32 - bits): at or above it, 16 bits leave first
  uint32_t bias;      // start, or start + M - 1 where freq = 1 (see make_step)
  uint32_t multiple;  // M - freq
  uint32_t freq;
};

Step make_step(uint32_t start, uint32_t freq, int bits) {
  const uint32_t slots = 1u << bits;
  Step s{0, 0, 0, 0, freq};
  if (freq == 0) return s;
  s.limit = freq << (32 - bits);
  s.multiple = slots - freq;
  if (freq == 1) {
    // 2^64 / 1 does not fit; 2^64 - 1 gives the quotient x - 1, and the bias makes up for it.
    s.reciprocal = ~uint64_t{0};
    s.bias = start + slots - 1;
  } else {
    s.reciprocal = ~uint64_t{0} / freq + 1;
    s.bias = start;
  }
  return s;
}

inline uint32_t put(uint32_t x, const Step& s, uint8_t*& out) {
  const uint16_t word = static_cast<uint16_t>(x);
  memcpy(out - 2, &word, 2);
  // Arithmetic instead of a branch: whether a word leaves is as good as random, and a misprediction costs 20 cycles.
  const uint32_t full = x >= s.limit;
  out -= 2 * full;
  x >>= 16 * full;
  const uint32_t quotient = static_cast<uint32_t>((static_cast<unsigned __int128>(x) * s.reciprocal) >> 64);
  return x + s.bias + quotient * s.multiple;  // = quotient·M + x % freq + start
}

template <class Symbol>
int64_t encode(const Symbol* symbols, size_t n, const Step* steps, uint32_t alphabet, uint8_t* out, size_t capacity) {
  if (capacity < kStateBytes + 2 * n) return kNoSpace;
  uint32_t x[kLanes];
  for (uint32_t& lane : x) lane = kLow;
  // Backwards from the end of the buffer: the decoder then reads forwards.
  uint8_t* const end = out + capacity;
  uint8_t* p = end;
  bool absent = false;
  for (size_t i = n; i-- > 0;) {
    const uint32_t symbol = symbols[i];
    if (symbol >= alphabet) return kArgument;
    const Step& s = steps[symbol];
    absent |= s.freq == 0;
    x[i % kLanes] = put(x[i % kLanes], s, p);
  }
  if (absent) return kArgument;
  p -= kStateBytes;
  memcpy(p, x, kStateBytes);
  memmove(out, p, static_cast<size_t>(end - p));
  return end - p;
}

// One round or a part of it; `checked` where the stream may end within it. False: it did.
template <bool packed, bool checked, class Out>
inline bool decode_round(RansDecoder& d, const RansTable& t, Out* out, int count) {
  const uint32_t bits = packed ? 12 : t.bits, mask = t.mask();
  const uint16_t* symbols = t.symbols();
  const uint8_t* p = d.next;
  for (int lane = 0; lane < count; lane++) {
    uint32_t x = d.x[lane];
    const uint32_t slot = x & mask, entry = t.slots[slot];
    if (packed) {
      out[lane] = static_cast<Out>(entry & 255);
      x = (entry >> 20) * (x >> bits) + (entry >> 8 & 4095);
    } else {
      out[lane] = static_cast<Out>(symbols[slot]);
      x = (entry >> 16) * (x >> bits) + (entry & 65535);
    }
    const uint32_t low = x < kLow;
    if (checked) {
      if (low) {
        if (d.end - p < 2) return false;
        x = x << 16 | load16(p);
        p += 2;
      }
    } else {
      x = x << 16 * low | (load16(p) & (0u - low));  // no branch: see put()
      p += 2 * low;
    }
    d.x[lane] = x;
  }
  d.next = p;
  return true;
}

template <bool packed, class Out>
bool decode_portable(RansDecoder& d, const RansTable& t, Out* out, size_t n) {
  while (n >= kLanes && d.end - d.next >= kRoundBytes) {
    decode_round<packed, false>(d, t, out, kLanes);
    out += kLanes;
    n -= kLanes;
  }
  while (n > 0) {
    const int count = n < kLanes ? static_cast<int>(n) : kLanes;
    if (!decode_round<packed, true>(d, t, out, count)) return false;
    out += count;
    n -= count;
  }
  return true;
}

// n is a multiple of kLanes except in a stream's last call.
template <class Out>
bool decode_block(RansDecoder& d, const RansTable& t, Out* out, size_t n, bool avx2) {
#if GGP_X86
  if (avx2) {
    const size_t done = rans_rounds_avx2(d, t, out, n);
    out += done;
    n -= done;
  }
#endif
  (void)avx2;
  return t.packed ? decode_portable<true>(d, t, out, n) : decode_portable<false>(d, t, out, n);
}

bool start(RansDecoder& d, const uint8_t* in, size_t length) {
  if (length < kStateBytes) return false;
  memcpy(d.x, in, kStateBytes);
  d.next = in + kStateBytes;
  d.end = in + length;
  return true;
}

int64_t finish(const RansDecoder& d) {
  bool clean = d.next == d.end;
  for (uint32_t lane : d.x) clean &= lane == kLow;
  return clean ? kOk : kCorrupt;
}

template <class Out>
int64_t decode(const uint8_t* in, size_t length, const RansTable& t, Out* out, size_t n, bool avx2) {
  RansDecoder d;
  if (!start(d, in, length) || !decode_block(d, t, out, n, avx2)) return kTruncated;
  return finish(d);
}

template <class Value>
void look_up(const uint16_t* index, size_t n, const void* values, void* out) {
  const Value* from = static_cast<const Value*>(values);
  Value* to = static_cast<Value*>(out);
  for (size_t i = 0; i < n; i++) to[i] = from[index[i]];
}

bool cpu_has_avx2() {
#if GGP_X86
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

}  // namespace

GGP_API int ggp_has_avx2() { return cpu_has_avx2(); }

// The bytes ggp_rans_table writes for 2^bits slots; 0 where `bits` is out of range.
GGP_API size_t ggp_rans_table_bytes(int bits) {
  if (bits < kMinBits || bits > kMaxBits) return 0;
  return sizeof(RansTable) + (size_t{6} << bits);
}

// Build a decoder's table: symbols[i] owns freq[i] slots; the frequencies are at least 1 and sum to 2^bits.
GGP_API int64_t ggp_rans_table(const uint32_t* freq, const uint16_t* symbols, size_t n, int bits, void* table) {
  if (ggp_rans_table_bytes(bits) == 0 || n < 2 || n > size_t{1} << bits) return kArgument;
  const uint32_t slots = 1u << bits;
  uint64_t sum = 0;
  uint32_t largest = 0;
  for (size_t i = 0; i < n; i++) {
    if (freq[i] == 0 || freq[i] >= slots) return kArgument;
    sum += freq[i];
    if (symbols[i] > largest) largest = symbols[i];
  }
  if (sum != slots) return kArgument;
  RansTable& t = *static_cast<RansTable*>(table);
  t.bits = static_cast<uint32_t>(bits);
  t.packed = bits == 12 && largest < 256;
  t.symbol_limit = largest + 1;
  t.reserved = 0;
  uint16_t* const beside = const_cast<uint16_t*>(t.symbols());
  uint32_t slot = 0;
  for (size_t i = 0; i < n; i++) {
    for (uint32_t j = 0; j < freq[i]; j++, slot++) {
      t.slots[slot] = t.packed ? freq[i] << 20 | j << 8 | symbols[i] : freq[i] << 16 | j;
      if (!t.packed) beside[slot] = symbols[i];
    }
  }
  return kOk;
}

// The most bytes that encoding n symbols can take, and the capacity that ggp_rans_encode asks for.
GGP_API size_t ggp_rans_bound(size_t n) { return kStateBytes + 2 * n; }

// Encode n symbols of `width` 1 or 2 bytes; freq[s] slots belong to symbol s, 0 to a symbol that does not occur.
// The number of bytes written at `out`, or a Status.
GGP_API int64_t ggp_rans_encode(const void* symbols, int width, size_t n, const uint32_t* freq, size_t alphabet, int bits,
                                void* scratch, uint8_t* out, size_t capacity) {
  if (ggp_rans_table_bytes(bits) == 0 || alphabet > 65536) return kArgument;
  Step* steps = static_cast<Step*>(scratch);
  uint64_t sum = 0;
  for (size_t s = 0; s < alphabet; s++) {
    if (freq[s] >= 1u << bits) return kArgument;
    steps[s] = make_step(static_cast<uint32_t>(sum), freq[s], bits);
    sum += freq[s];
  }
  if (sum != 1u << bits) return kArgument;
  const uint32_t limit = static_cast<uint32_t>(alphabet);
  if (width == 1) return encode(static_cast<const uint8_t*>(symbols), n, steps, limit, out, capacity);
  if (width == 2) return encode(static_cast<const uint16_t*>(symbols), n, steps, limit, out, capacity);
  return kArgument;
}

// The bytes of scratch that ggp_rans_encode needs for an alphabet of that size.
GGP_API size_t ggp_rans_scratch_bytes(size_t alphabet) { return alphabet * sizeof(Step); }

// Decode exactly n symbols from exactly `length` bytes, as bytes.
GGP_API int64_t ggp_rans_decode(const uint8_t* in, size_t length, const void* table, uint8_t* out, size_t n, int portable) {
  const RansTable& t = *static_cast<const RansTable*>(table);
  if (t.symbol_limit > 256) return kArgument;
  return decode(in, length, t, out, n, !portable && cpu_has_avx2());
}

// Decode exactly n symbols, each replaced by values[symbol] of `width` 1, 2, 4 or 8 bytes; `count` values there are.
GGP_API int64_t ggp_rans_decode_values(const uint8_t* in, size_t length, const void* table, const void* values, size_t count,
                                       int width, uint8_t* out, size_t n, int portable) {
  const RansTable& t = *static_cast<const RansTable*>(table);
  if (t.symbol_limit > count) return kArgument;
  if (width != 1 && width != 2 && width != 4 && width != 8) return kArgument;
  const bool avx2 = !portable && cpu_has_avx2();
  constexpr size_t kBlock = 4096;
  uint16_t index[kBlock];
  RansDecoder d;
  if (!start(d, in, length)) return kTruncated;
  while (n > 0) {
    const size_t block = n < kBlock ? n : kBlock;
    if (!decode_block(d, t, index, block, avx2)) return kTruncated;
    if (width == 1) look_up<uint8_t>(index, block, values, out);
    if (width == 2) look_up<uint16_t>(index, block, values, out);
    if (width == 4) look_up<uint32_t>(index, block, values, out);
    if (width == 8) look_up<uint64_t>(index, block, values, out);
    out += block * static_cast<size_t>(width);
    n -= block;
  }
  return finish(d);
}

// Chunks `first` to `last` - 1 of a container, in one call so that threads meet in Python once for many symbols: each
// one's checksum, code and patches. out[0] is the first symbol of chunk `first`; `values` null: the symbols are bytes.
// kOk, or a Status, and in *failed the chunk that was refused; kNoSpace there says that its checksum is wrong.
GGP_API int64_t ggp_rans_chunks(const uint8_t* body, const int64_t* starts, const uint32_t* index, size_t first, size_t last,
                                size_t chunk, uint64_t total, const void* table, const void* values, size_t count, int type,
                                const int16_t* substitutes, uint8_t* out, int portable, int64_t* failed) {
  const int width = 1 << type / 2;
  for (size_t i = first; i < last; i++) {
    const uint8_t* in = body + starts[i];
    const size_t code = index[3 * i], patches = index[3 * i + 1];
    const uint64_t left = total - uint64_t{i} * chunk;
    const size_t n = left < chunk ? static_cast<size_t>(left) : chunk;
    *failed = static_cast<int64_t>(i);
    if (ggp_crc32c(0, in, code + patches, 0) != index[3 * i + 2]) return kNoSpace;
    const int64_t status = values ? ggp_rans_decode_values(in, code, table, values, count, width, out, n, portable)
                                  : ggp_rans_decode(in, code, table, out, n, portable);
    if (status < 0) return status;
    if (patches) {
      const int64_t patched = ggp_patch(in + code, patches, substitutes, type, out, n);
      if (patched < 0) return patched;
    }
    out += n * static_cast<size_t>(width);
  }
  return kOk;
}
