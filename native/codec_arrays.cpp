// Passes over whole arrays that go with the coder: histograms, symbols to table indices, byte planes, dequantization.

#include "codec.h"

#include <cstring>

namespace {

template <class T>
uint64_t histogram(const T* in, size_t n, int64_t low, uint64_t size, uint64_t* counts) {
  uint64_t outside = 0;
  for (size_t i = 0; i < n; i++) {
    // Unsigned wrap-around makes one comparison of two.
    const uint64_t at = static_cast<uint64_t>(in[i]) - static_cast<uint64_t>(low);
    if (at < size) counts[at]++;
    else outside++;
  }
  return outside;
}

template <class T, class Index>
int64_t to_index(const T* in, size_t n, int64_t low, uint64_t size, const uint16_t* index, uint16_t filler, Index* out,
                 uint64_t* patches, size_t capacity) {
  size_t found = 0;
  for (size_t i = 0; i < n; i++) {
    const uint64_t at = static_cast<uint64_t>(in[i]) - static_cast<uint64_t>(low);
    uint16_t v = at < size ? index[at] : 0xffff;
    if (v == 0xffff) {
      if (found == capacity) return kNoSpace;
      patches[found++] = i;
      v = filler;
    }
    out[i] = static_cast<Index>(v);
  }
  return static_cast<int64_t>(found);
}

// Call f with the array's own type.
template <class F>
int64_t typed(const void* in, int type, F f) {
  switch (type) {
    case kU8: return f(static_cast<const uint8_t*>(in));
    case kI8: return f(static_cast<const int8_t*>(in));
    case kU16: return f(static_cast<const uint16_t*>(in));
    case kI16: return f(static_cast<const int16_t*>(in));
    case kU32: return f(static_cast<const uint32_t*>(in));
    case kI32: return f(static_cast<const int32_t*>(in));
    case kU64: return f(static_cast<const uint64_t*>(in));
    case kI64: return f(static_cast<const int64_t*>(in));
    default: return kArgument;
  }
}

// Rotating left by one moves the sign behind the mantissa, so that the top byte is bits of the exponent alone.
template <class Word, bool rotate>
void split(const uint8_t* in, size_t n, uint8_t* planes) {
  constexpr int width = sizeof(Word), top = 8 * width - 1;
  for (size_t i = 0; i < n; i++) {
    Word v;
    memcpy(&v, in + i * width, width);
    if (rotate) v = static_cast<Word>(static_cast<Word>(v << 1) | static_cast<Word>(v >> top));
    for (int b = 0; b < width; b++) planes[static_cast<size_t>(b) * n + i] = static_cast<uint8_t>(v >> (top - 7 - 8 * b));
  }
}

template <class Word, bool rotate>
void merge(const uint8_t* planes, size_t stride, size_t n, uint8_t* out) {
  constexpr int width = sizeof(Word), top = 8 * width - 1;
  for (size_t i = 0; i < n; i++) {
    Word v = 0;
    for (int b = 0; b < width; b++)
      v = static_cast<Word>(v | static_cast<Word>(Word{planes[static_cast<size_t>(b) * stride + i]} << (top - 7 - 8 * b)));
    if (rotate) v = static_cast<Word>(static_cast<Word>(v >> 1) | static_cast<Word>(v << top));
    memcpy(out + i * width, &v, width);
  }
}

}  // namespace

// counts[v - low] += 1 for the values in [low, low + size); the number of values outside.
GGP_API int64_t ggp_histogram(const void* in, int type, size_t n, int64_t low, uint64_t size, uint64_t* counts) {
  if (type == kU8 && low == 0 && size == 256) {
    // Four counters for each byte: equal neighbours, the rule in a sparse weight, would wait for each other's store.
    uint32_t part[4][256];
    const uint8_t* p = static_cast<const uint8_t*>(in);
    while (n > 0) {
      const size_t block = n < (size_t{1} << 30) ? n : size_t{1} << 30;
      memset(part, 0, sizeof part);
      size_t i = 0;
      for (; i + 4 <= block; i += 4)
        for (int k = 0; k < 4; k++) part[k][p[i + static_cast<size_t>(k)]]++;
      for (; i < block; i++) part[0][p[i]]++;
      for (int v = 0; v < 256; v++) counts[v] += uint64_t{part[0][v]} + part[1][v] + part[2][v] + part[3][v];
      p += block;
      n -= block;
    }
    return 0;
  }
  return typed(in, type, [&](auto* p) { return static_cast<int64_t>(histogram(p, n, low, size, counts)); });
}

// out[i] = index[in[i] - low]; where there is none (0xffff) or the value lies outside, `filler`, and i joins `patches`.
// The number of patches, or a Status. `width`: 1 or 2 bytes an output element.
GGP_API int64_t ggp_to_index(const void* in, int type, size_t n, int64_t low, uint64_t size, const uint16_t* index,
                             int filler, void* out, int width, uint64_t* patches, size_t capacity) {
  const uint16_t fill = static_cast<uint16_t>(filler);
  return typed(in, type, [&](auto* p) {
    return width == 1 ? to_index(p, n, low, size, index, fill, static_cast<uint8_t*>(out), patches, capacity)
                      : to_index(p, n, low, size, index, fill, static_cast<uint16_t*>(out), patches, capacity);
  });
}

// planes[b·n + i] = byte b, most significant first, of element i, rotated left by one bit if `rotate`.
GGP_API int64_t ggp_planes_split(const uint8_t* in, size_t n, int width, int rotate, uint8_t* planes) {
  switch (width * 2 + (rotate ? 1 : 0)) {
    case 2: split<uint8_t, false>(in, n, planes); return kOk;
    case 3: split<uint8_t, true>(in, n, planes); return kOk;
    case 4: split<uint16_t, false>(in, n, planes); return kOk;
    case 5: split<uint16_t, true>(in, n, planes); return kOk;
    case 8: split<uint32_t, false>(in, n, planes); return kOk;
    case 9: split<uint32_t, true>(in, n, planes); return kOk;
    case 16: split<uint64_t, false>(in, n, planes); return kOk;
    case 17: split<uint64_t, true>(in, n, planes); return kOk;
    default: return kArgument;
  }
}

// The inverse of ggp_planes_split for n elements of planes that lie `stride` bytes apart.
GGP_API int64_t ggp_planes_merge(const uint8_t* planes, size_t stride, size_t n, int width, int rotate, uint8_t* out) {
  switch (width * 2 + (rotate ? 1 : 0)) {
    case 2: merge<uint8_t, false>(planes, stride, n, out); return kOk;
    case 3: merge<uint8_t, true>(planes, stride, n, out); return kOk;
    case 4: merge<uint16_t, false>(planes, stride, n, out); return kOk;
    case 5: merge<uint16_t, true>(planes, stride, n, out); return kOk;
    case 8: merge<uint32_t, false>(planes, stride, n, out); return kOk;
    case 9: merge<uint32_t, true>(planes, stride, n, out); return kOk;
    case 16: merge<uint64_t, false>(planes, stride, n, out); return kOk;
    case 17: merge<uint64_t, true>(planes, stride, n, out); return kOk;
    default: return kArgument;
  }
}

// out[i] = codebook[codes[i]] · scale[row of element first + i], rows of `columns` elements; one scale: for all rows.
GGP_API int64_t ggp_dequantize(const uint8_t* codes, size_t n, size_t first, size_t columns, const float* codebook,
                               const float* scale, size_t scales, float* out) {
  if (n == 0) return kOk;
  if (columns == 0 || scales == 0 || (scales > 1 && (first + n - 1) / columns >= scales)) return kArgument;
  size_t i = 0;
  while (i < n) {
    const size_t at = first + i, left = columns - at % columns;
    const size_t stop = n - i < left ? n : i + left;
    const float s = scale[scales > 1 ? at / columns : 0];
    for (; i < stop; i++) out[i] = codebook[codes[i]] * s;
  }
  return kOk;
}
