// libFuzzer target for the native decoder, to be built with AddressSanitizer; see README.md here.
//
// Whatever the bytes: no read or write outside the buffers, no hang, and the AVX2 and the portable decoder answer the
// same. Where the bytes are taken as symbols, encoding and decoding must give them back.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../native/codec.h"

GGP_API uint32_t ggp_crc32c(uint32_t, const uint8_t*, size_t, int);
GGP_API size_t ggp_rans_table_bytes(int);
GGP_API int64_t ggp_rans_table(const uint32_t*, const uint16_t*, size_t, int, void*);
GGP_API size_t ggp_rans_bound(size_t);
GGP_API size_t ggp_rans_scratch_bytes(size_t);
GGP_API int64_t ggp_rans_encode(const void*, int, size_t, const uint32_t*, size_t, int, void*, uint8_t*, size_t);
GGP_API int64_t ggp_rans_decode(const uint8_t*, size_t, const void*, uint8_t*, size_t, int);
GGP_API int64_t ggp_rans_decode_values(const uint8_t*, size_t, const void*, const void*, size_t, int, uint8_t*, size_t, int);
GGP_API int64_t ggp_exp_golomb_bits(const uint64_t*, size_t, int);
GGP_API int64_t ggp_exp_golomb_encode(const uint64_t*, size_t, int, uint8_t*, size_t);
GGP_API int64_t ggp_exp_golomb_decode(const uint8_t*, size_t, size_t, int, uint64_t*);
GGP_API int64_t ggp_read_model(const uint8_t*, size_t, int64_t*, uint32_t*, size_t);
GGP_API int64_t ggp_patch(const uint8_t*, size_t, const int16_t*, int, void*, size_t);
GGP_API int64_t ggp_planes_split(const uint8_t*, size_t, int, int, uint8_t*);
GGP_API int64_t ggp_planes_merge(const uint8_t*, size_t, size_t, int, int, uint8_t*);

namespace {

// Exactly as many bytes as asked for, so that AddressSanitizer sees the first byte past the end.
template <class T>
std::unique_ptr<T[]> exact(size_t n) {
  return std::unique_ptr<T[]>(new T[n]());
}

std::unique_ptr<uint8_t[]> copy(const uint8_t* data, size_t size) {
  auto out = exact<uint8_t>(size);
  if (size) memcpy(out.get(), data, size);
  return out;
}

void require(bool ok, const char* what) {
  if (!ok) {
    fprintf(stderr, "broken: %s\n", what);
    abort();
  }
}

struct Table {
  int bits;
  std::vector<uint32_t> freq;
  std::vector<uint16_t> symbols;
  std::unique_ptr<uint32_t[]> bytes;
};

// A legal table of `count` symbols whose frequencies follow `weights`.
Table table_of(const uint8_t* weights, size_t count, int bits) {
  Table t{bits, std::vector<uint32_t>(count), std::vector<uint16_t>(count), nullptr};
  const uint32_t slots = 1u << bits;
  uint32_t left = slots - static_cast<uint32_t>(count);
  for (size_t i = 0; i < count; i++) {
    const uint32_t more = i + 1 == count ? left : left * weights[i] / 256;
    t.freq[i] = 1 + more;
    t.symbols[i] = static_cast<uint16_t>(i);
    left -= more;
  }
  t.bytes.reset(new uint32_t[(ggp_rans_table_bytes(bits) + 3) / 4]);
  require(ggp_rans_table(t.freq.data(), t.symbols.data(), count, bits, t.bytes.get()) == kOk, "a legal table");
  return t;
}

void fuzz_rans(const uint8_t* data, size_t size, bool whole_tables) {
  if (size < 6) return;
  const int bits = 8 + data[0] % 8;
  const size_t n = data[1] | size_t(data[2]) << 8, width = size_t{1} << data[3] % 4;
  size_t count = 2 + (data[4] | size_t(data[5] & 1) << 8);
  data += 6;
  size -= 6;
  if (whole_tables) {  // any table at all: most are refused
    const size_t words = size / 4;
    std::vector<uint32_t> freq(words);
    if (words) memcpy(freq.data(), data, words * 4);
    std::vector<uint16_t> symbols(words, static_cast<uint16_t>(n));
    std::unique_ptr<uint32_t[]> table(new uint32_t[(ggp_rans_table_bytes(bits) + 3) / 4]);
    ggp_rans_table(freq.data(), symbols.data(), words, bits, table.get());
    return;
  }
  if (count > size || count > size_t{1} << bits) return;
  const Table t = table_of(data, count, bits);
  data += count;
  size -= count;
  auto in = copy(data, size);
  if (count <= 256) {
    auto fast = exact<uint8_t>(n), slow = exact<uint8_t>(n);
    const int64_t a = ggp_rans_decode(in.get(), size, t.bytes.get(), fast.get(), n, 0);
    const int64_t b = ggp_rans_decode(in.get(), size, t.bytes.get(), slow.get(), n, 1);
    require(a == b && (a == kTruncated || memcmp(fast.get(), slow.get(), n) == 0), "AVX2 equals portable");
  }
  auto values = exact<uint8_t>(count * width), out = exact<uint8_t>(n * width);
  ggp_rans_decode_values(in.get(), size, t.bytes.get(), values.get(), count, static_cast<int>(width), out.get(), n, 0);
  // The rest as symbols: there and back.
  auto symbols = exact<uint16_t>(size);
  for (size_t i = 0; i < size; i++) symbols[i] = static_cast<uint16_t>(data[i] % count);
  const size_t bound = ggp_rans_bound(size);
  auto code = exact<uint8_t>(bound);
  std::vector<uint64_t> scratch(ggp_rans_scratch_bytes(count) / 8 + 1);
  const int64_t length =
      ggp_rans_encode(symbols.get(), 2, size, t.freq.data(), count, bits, scratch.data(), code.get(), bound);
  require(length > 0, "encoding succeeds");
  auto tight = copy(code.get(), static_cast<size_t>(length));
  auto identity = exact<uint16_t>(count), back = exact<uint16_t>(size);
  for (size_t i = 0; i < count; i++) identity[i] = static_cast<uint16_t>(i);
  const int64_t status = ggp_rans_decode_values(tight.get(), static_cast<size_t>(length), t.bytes.get(), identity.get(), count,
                                                2, reinterpret_cast<uint8_t*>(back.get()), size, count & 1);
  require(status == kOk && memcmp(back.get(), symbols.get(), 2 * size) == 0, "a round trip");
}

void fuzz_exp_golomb(const uint8_t* data, size_t size) {
  if (size < 3) return;
  const int order = data[0] % 34;
  const size_t n = data[1] | size_t(data[2]) << 8;
  auto in = copy(data + 3, size - 3);
  auto out = exact<uint64_t>(n);
  const int64_t used = ggp_exp_golomb_decode(in.get(), size - 3, n, order, out.get());
  if (used < 0) return;
  const int64_t bits = ggp_exp_golomb_bits(out.get(), n, order);
  require(bits >= 0 && (bits + 7) / 8 == used, "the length of what was decoded");
  auto again = exact<uint8_t>(static_cast<size_t>(used));
  require(ggp_exp_golomb_encode(out.get(), n, order, again.get(), static_cast<size_t>(used)) == used, "encoding again");
  require(memcmp(again.get(), in.get(), static_cast<size_t>(used)) == 0, "the code is unique");
}

void fuzz_patch(const uint8_t* data, size_t size) {
  if (size < 4) return;
  static const int widths[8] = {1, 1, 2, 2, 4, 4, 8, 8};
  const int type = data[0] % 8;
  const size_t n = data[1] | size_t(data[2]) << 8;
  int16_t substitutes[256];
  for (int i = 0; i < 256; i++) substitutes[i] = static_cast<int16_t>(i % 7 == 6 ? -1 : i);
  auto in = copy(data + 4, size - 4);
  auto out = exact<uint8_t>(n * static_cast<size_t>(widths[type]));
  ggp_patch(in.get(), size - 4, type == kU8 && data[3] & 1 ? substitutes : nullptr, type, out.get(), n);
}

void fuzz_model(const uint8_t* data, size_t size) {
  if (size < 1) return;
  const size_t capacity = 4 * (size - 1);
  auto in = copy(data + 1, size - 1);
  auto values = exact<int64_t>(capacity);
  auto freq = exact<uint32_t>(capacity);
  const int64_t count = ggp_read_model(in.get(), size - 1, values.get(), freq.get(), capacity);
  if (count < 0) return;
  auto symbols = exact<uint16_t>(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) symbols[static_cast<size_t>(i)] = static_cast<uint16_t>(i);
  for (int64_t i = 1; i < count; i++)
    require(values[static_cast<size_t>(i)] > values[static_cast<size_t>(i - 1)], "ascending values");
  const int bits = 8 + data[0] % 8;
  std::unique_ptr<uint32_t[]> table(new uint32_t[(ggp_rans_table_bytes(bits) + 3) / 4]);
  ggp_rans_table(freq.get(), symbols.get(), static_cast<size_t>(count), bits, table.get());
}

void fuzz_planes(const uint8_t* data, size_t size) {
  if (size < 1) return;
  const int width = 1 << (data[0] & 3), rotate = data[0] >> 2 & 1;
  const size_t n = (size - 1) / static_cast<size_t>(width), bytes = n * static_cast<size_t>(width);
  auto in = copy(data + 1, bytes), planes = exact<uint8_t>(bytes), back = exact<uint8_t>(bytes);
  require(ggp_planes_split(in.get(), n, width, rotate, planes.get()) == kOk, "splitting");
  require(ggp_planes_merge(planes.get(), n, n, width, rotate, back.get()) == kOk, "merging");
  require(memcmp(in.get(), back.get(), bytes) == 0, "planes there and back");
  require(ggp_crc32c(0, in.get(), bytes, 0) == ggp_crc32c(0, in.get(), bytes, 1), "one checksum");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  switch (data[0] % 8) {
    case 0: fuzz_exp_golomb(data + 1, size - 1); break;
    case 1: fuzz_patch(data + 1, size - 1); break;
    case 2: fuzz_planes(data + 1, size - 1); break;
    case 3: fuzz_rans(data + 1, size - 1, true); break;
    case 4: fuzz_model(data + 1, size - 1); break;
    default: fuzz_rans(data + 1, size - 1, false); break;
  }
  return 0;
}
