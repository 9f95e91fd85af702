// 16-bit floats, and what a warp does together, from the PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point
// type", "ldmatrix". Written from those pages alone, not from the kernels' geometry.
#include <cstring>

#include "emulator.h"

using namespace emulator;

namespace {

float as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

unsigned as_bits(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// value / 2^shift, to nearest, ties to even.
unsigned shift_right(unsigned value, int shift) {
  if (shift > 31) return 0;
  unsigned whole = value >> shift, rest = value & ((1u << shift) - 1), half = 1u << (shift - 1);
  return whole + (rest > half || (rest == half && (whole & 1)));
}

unsigned element(const unsigned* words, int i) { return words[i / 2] >> (i % 2 * 16) & 0xffff; }

void multiply(Thread** lanes) {
  auto to_float = (float (*)(unsigned))lanes[0]->operands[3];
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    auto words_a = (const unsigned*)lanes[lane]->operands[1], words_b = (const unsigned*)lanes[lane]->operands[2];
    for (int i = 0; i < 8; ++i) {
      int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = to_float(element(words_a, i));
    }
    for (int i = 0; i < 4; ++i) b[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = to_float(element(words_b, i));
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto sums = (float*)lanes[lane]->operands[0];
    for (int i = 0; i < 4; ++i) {
      int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      float sum = sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      sums[i] = sum;
    }
  }
}

void load_matrices(Thread** lanes) {
  int matrices = (int)(intptr_t)lanes[0]->operands[2];
  bool transposed = lanes[0]->operands[3] != nullptr;
  for (int matrix = 0; matrix < matrices; ++matrix)
    for (int lane = 0; lane < kWarp; ++lane) {
      unsigned word = 0;
      for (int i = 0; i < 2; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i;
        if (transposed) std::swap(row, column);
        auto from = (const uint8_t*)lanes[matrix * 8 + row]->operands[1] + column * 2;
        access(*lanes[lane], from, 2, false);
        unsigned short value;
        memcpy(&value, from, 2);
        word |= (unsigned)value << (16 * i);
      }
      ((unsigned*)lanes[lane]->operands[0])[matrix] = word;
    }
}

}  // namespace

extern "C" {

float ggp_float_bf16(unsigned bits) { return as_float(bits << 16); }

float ggp_float_f16(unsigned bits) {
  unsigned sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    float small = (float)mantissa * 0x1p-24f;
    return sign ? -small : small;
  }
  return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

unsigned ggp_bits_bf16(float value) {
  if (value != value) return 0x7fff;
  return shift_right(as_bits(value), 16);
}

unsigned ggp_bits_f16(float value) {
  if (value != value) return 0x7fff;
  unsigned bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and more
  if (magnitude >= 0x38800000) return sign | shift_right(magnitude - (112u << 23), 13);  // normal: a carry is right
  int exponent = (int)(magnitude >> 23);
  unsigned mantissa = (magnitude & 0x7fffff) | (exponent ? 0x800000 : 0);
  return sign | shift_right(mantissa, 126 - (exponent ? exponent : 1));  // in units of 2^-24
}

void ggp_warp_mma(float* sums, const unsigned* a, const unsigned* b, float (*to_float)(unsigned)) {
  void* operands[4] = {sums, (void*)a, (void*)b, (void*)to_float};
  memcpy(current->operands, operands, sizeof operands);
  collective("mma", __builtin_return_address(0), multiply);
}

void ggp_warp_ldmatrix(unsigned* out, const void* row, int matrices, int transposed) {
  if ((uintptr_t)row % 16) fail("ldmatrix of a row at an address that is no multiple of 16");
  void* operands[4] = {out, (void*)row, (void*)(intptr_t)matrices, (void*)(intptr_t)transposed};
  memcpy(current->operands, operands, sizeof operands);
  collective("ldmatrix", __builtin_return_address(0), load_matrices);
}

unsigned ggp_warp_xor(unsigned value, int mask) {
  unsigned out = value;
  current->operands[0] = &out;
  current->operands[1] = (void*)(intptr_t)mask;
  collective("shuffle", __builtin_return_address(0), [](Thread** lanes) {
    unsigned values[kWarp];
    for (int i = 0; i < kWarp; ++i) values[i] = *(unsigned*)lanes[i]->operands[0];
    for (int i = 0; i < kWarp; ++i) *(unsigned*)lanes[i]->operands[0] = values[i ^ (int)(intptr_t)lanes[i]->operands[1]];
  });
  return out;
}
}
