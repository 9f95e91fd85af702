#include "tensor.h"

namespace ggpass {

int64_t product(const Shape &shape, size_t first, size_t last) {
  int64_t count = 1;
  for (size_t i = first; i < last; i++)
    if (__builtin_mul_overflow(count, shape[i], &count)) fail("the shape %s is too large", text(shape).c_str());
  return count;
}

int64_t Tensor::count() const { return product(shape, 0, shape.size()); }

std::string text(const Shape &shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); i++) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

const char *name_of(OrtElement element) {
  static const char *const names[] = {"undefined", "float", "uint8",  "int8",    "uint16", "int16",
                                      "int32",     "int64", "string", "bool",    "float16", "double",
                                      "uint32",    "uint64"};
  if (element == ORT_BFLOAT16) return "bfloat16";
  const auto index = static_cast<size_t>(element);
  return index < sizeof names / sizeof *names ? names[index] : "of another type";
}

Tensor tensor_of(const OrtApi &api, const OrtValue *value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo *info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus *status = api.GetTensorElementType(info, &tensor.element);
  if (status == nullptr) status = api.GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    tensor.shape.resize(rank);
    status = api.GetDimensions(info, tensor.shape.data(), rank);
  }
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  void *data = nullptr;
  // The table has no reader that leaves the tensor const until version 23; this one hands out the same address.
  check(api, api.GetTensorMutableData(const_cast<OrtValue *>(value), &data));
  tensor.data = data;
  return tensor;
}

int64_t attribute(const OrtApi &api, const OrtKernelInfo *info, const char *name, int64_t otherwise) {
  int64_t value = otherwise;
  OrtStatus *status = api.KernelInfoGetAttribute_int64(info, name, &value);
  if (status == nullptr) return value;
  api.ReleaseStatus(status);
  return otherwise;
}

std::vector<int64_t> attributes(const OrtApi &api, const OrtKernelInfo *info, const char *name) {
  size_t count = 0;
  OrtStatus *status = api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &count);
  if (status != nullptr) {
    api.ReleaseStatus(status);
    return {};
  }
  std::vector<int64_t> values(count);
  if (count > 0) check(api, api.KernelInfoGetAttributeArray_int64(info, name, values.data(), &count));
  return values;
}

}  // namespace ggpass
