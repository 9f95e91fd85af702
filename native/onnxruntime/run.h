// One call of a generated kernel.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"

namespace ggpass {

// A tensor argument of one or two dimensions; strides count elements.
struct Argument {
  const void *data;
  uint8_t code, bits;  // DLPack's type: 0 signed, 1 unsigned, 2 floating
  int32_t dimensions;
  int64_t shape[2];
  int64_t strides[2];
};

inline Argument floats(const float *data, int64_t count, int64_t step = 1) {
  return {data, 2, 32, 1, {count, 0}, {step, 0}};
}
inline Argument floats(const float *data, int64_t rows, int64_t columns, int64_t row_step) {
  return {data, 2, 32, 2, {rows, columns}, {row_step, 1}};
}
inline Argument bytes(const uint8_t *data, int64_t rows, int64_t columns) {
  return {data, 1, 8, 2, {rows, columns}, {columns, 1}};
}
inline Argument numbers(const int64_t *data, int64_t count) { return {data, 0, 64, 1, {count, 0}, {1, 0}}; }

// Fails with the kernel's own message where it refuses its arguments or cannot have memory.
void run(Generated *kernel, std::initializer_list<Argument> arguments);

// What a kernel reported last on this thread.
std::string take_kernel_error();

}  // namespace ggpass
