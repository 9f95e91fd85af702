// ONNX Runtime's tensors and attributes as plain values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "failure.h"
#include "ort_abi.h"

namespace ggpass {

using Shape = std::vector<int64_t>;

// An input as it lies in memory; `data` is null where an optional input is left out.
struct Tensor {
  OrtElement element = ORT_UNDEFINED;
  Shape shape;
  const void *data = nullptr;

  bool given() const { return data != nullptr || element != ORT_UNDEFINED; }
  int64_t count() const;
};

// "(2, 3)".
std::string text(const Shape &shape);

// "float16", as ONNX calls it.
const char *name_of(OrtElement element);

// The product of dims [first, last); fails where it does not fit 63 bits.
int64_t product(const Shape &shape, size_t first, size_t last);

Tensor tensor_of(const OrtApi &api, const OrtValue *value);

// Attributes: the default where the node has none of that name.
int64_t attribute(const OrtApi &api, const OrtKernelInfo *info, const char *name, int64_t otherwise);
std::vector<int64_t> attributes(const OrtApi &api, const OrtKernelInfo *info, const char *name);

}  // namespace ggpass
