// What CUDA C means on the emulator: the generated source is compiled as it is, behind this header, as C++17 for the CPU.
//
// Every access to memory outside a thread's own stack is reported to memory.cpp (the compiler's kernel-address
// sanitizer calls our functions), so bounds, alignment, races and unwritten shared memory are seen as they happen.
#pragma once

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct EmulatedIndex {
  unsigned x, y, z;
};
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) ushort2 {
  unsigned short x, y;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

extern "C" {
// Every thread of the block arrives, at the same place.
void __syncthreads();
// Every lane of the warp arrives, at the same place; what they wrote to shared memory is seen by each other after.
void __syncwarp(unsigned mask = 0xffffffffu);

// The bits of a 16-bit float as a float, and back: to nearest, ties to even, subnormals kept, overflow to infinity.
float ggp_float_bf16(unsigned bits);
float ggp_float_f16(unsigned bits);
unsigned ggp_bits_bf16(float value);
unsigned ggp_bits_f16(float value);

// mma.sync.m16n8k16.row.col.f32: a warp's sums += A * B. Products are exact; a sum's sixteen are added to it one by
// one in the order of k, each addition rounded to float32. (Hardware adds in an order of its own, and truncates.)
void ggp_warp_mma(float* sums, const unsigned* a, const unsigned* b, float (*to_float)(unsigned));
// ldmatrix.sync.m8n8.x1, .x2 or .x4 (.trans): lane i hands in the address of row i % 8 of matrix i / 8.
void ggp_warp_ldmatrix(unsigned* out, const void* row, int matrices, int transposed);
// The value of lane (lane ^ mask).
unsigned ggp_warp_xor(unsigned value, int mask);

// cp.async: `bytes` of 16 from global to shared memory, the rest zero. Nothing is copied before a wait demands it.
void ggp_later_copy(void* to, const void* from, int bytes);
void ggp_later_commit();
void ggp_later_wait(int groups);
}
