#include "node.h"

#include <cstring>
#include <utility>

namespace ggpass {
namespace {

using R = Role;

// The version of the operators that this library runs; a node says its own in its attribute `op_version`, since
// ONNX Runtime shows a library neither the version of the domain nor lets it register two of them.
constexpr int64_t kVersion = 1;

const char *const kRoleNames[] = {"x", "ids", "codes", "scale", "codebook", "bias"};

const char *name_of(Role role) { return kRoleNames[static_cast<int>(role)]; }

// Empty where the type is taken, else what would be.
const char *wanted(Role role, OrtElement element, OrtElement x) {
  switch (role) {
    case R::kX:
      return element == ORT_FLOAT || element == ORT_FLOAT16 ? "" : "float or float16; put a Cast before the node";
    case R::kIds:
      return element == ORT_INT64 || element == ORT_INT32 ? "" : "int64 or int32; put a Cast before the node";
    case R::kCodes:
      return element == ORT_UINT8 ? "" : "uint8; export the model again with ggpass";
    case R::kScale:
    case R::kCodebook:
      return element == ORT_FLOAT ? "" : "float; export the model again with ggpass";
    case R::kBias:
      return element == x ? "" : "of the type of x; put a Cast before the node";
  }
  return "";
}

// The element type of an input; undefined where the node leaves it out.
OrtElement type_of(const OrtApi &api, const OrtKernelInfo *info, size_t index) {
  size_t count = 0;
  check(api, api.KernelInfo_GetInputCount(info, &count));
  if (index >= count) return ORT_UNDEFINED;
  OrtTypeInfo *type = nullptr;
  OrtStatus *status = api.KernelInfo_GetInputTypeInfo(info, index, &type);
  if (status != nullptr) {
    api.ReleaseStatus(status);
    return ORT_UNDEFINED;
  }
  const OrtTensorTypeAndShapeInfo *tensor = nullptr;
  OrtElement element = ORT_UNDEFINED;
  status = api.CastTypeInfoToTensorInfo(type, &tensor);
  if (status == nullptr && tensor != nullptr) status = api.GetTensorElementType(tensor, &element);
  api.ReleaseTypeInfo(type);
  check(api, status);
  return element;
}

// The tensor of an input that lies in the file; not given where it is computed.
Tensor constant(const OrtApi &api, const OrtKernelInfo *info, size_t index) {
  int is_constant = 0;
  const OrtValue *value = nullptr;
  OrtStatus *status = api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value);
  if (status != nullptr) {
    api.ReleaseStatus(status);
    return {};
  }
  return is_constant != 0 ? tensor_of(api, value) : Tensor{};
}

}  // namespace

const Definition kDefinitions[] = {
    {"RF8MatMul", Operation::kMatMul, 4, {R::kX, R::kCodes, R::kScale, R::kBias}},
    {"RF8Gather", Operation::kGather, 3, {R::kIds, R::kCodes, R::kScale}},
    {"RF8Dequantize", Operation::kDequantize, 2, {R::kCodes, R::kScale}},
    {"RF8Conv", Operation::kConv, 4, {R::kX, R::kCodes, R::kScale, R::kBias}},
    {"CodebookMatMul", Operation::kMatMul, 5, {R::kX, R::kCodes, R::kScale, R::kCodebook, R::kBias}},
    {"CodebookGather", Operation::kGather, 4, {R::kIds, R::kCodes, R::kScale, R::kCodebook}},
    {"CodebookDequantize", Operation::kDequantize, 3, {R::kCodes, R::kScale, R::kCodebook}},
    {"CodebookConv", Operation::kConv, 5, {R::kX, R::kCodes, R::kScale, R::kCodebook, R::kBias}},
    {nullptr, Operation::kMatMul, 0, {}},
};

bool Definition::has(Role role) const { return index(role) < inputs; }

size_t Definition::index(Role role) const {
  size_t i = 0;
  while (i < inputs && roles[i] != role) i++;
  return i;
}

std::string describe(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info) {
  char name[256] = "";
  size_t size = sizeof name;
  OrtStatus *status = api.KernelInfo_GetNodeName(info, name, &size);
  if (status != nullptr) {  // longer than the buffer
    api.ReleaseStatus(status);
    std::strcpy(name, "with a long name");
  }
  return std::string(definition.name) + " node \"" + name + "\"";
}

void check_node(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info) {
  const int64_t version = attribute(api, info, "op_version", kVersion);
  if (version > kVersion)
    fail("the file asks for version %lld of the operator and this library runs version %lld; upgrade ggpass",
         static_cast<long long>(version), static_cast<long long>(kVersion));
  if (version < 1)
    fail("the file asks for version %lld of the operator; versions begin at 1", static_cast<long long>(version));
  const OrtElement x = type_of(api, info, 0);
  for (size_t i = 0; i < definition.inputs; i++) {
    const Role role = definition.roles[i];
    const OrtElement element = type_of(api, info, i);
    if (element == ORT_UNDEFINED) {
      if (role == R::kBias) continue;
      fail("the input %s (number %zu) is missing; export the model again with ggpass", name_of(role), i);
    }
    const char *other = wanted(role, element, x);
    if (*other != '\0') fail("the input %s is %s; it must be %s", name_of(role), name_of(element), other);
  }
}

Tensor Call::input(Role role) const {
  size_t count = 0;
  check(api_, api_.KernelContext_GetInputCount(context_, &count));
  const size_t index = definition_.index(role);
  if (index >= definition_.inputs || index >= count) return {};
  const OrtValue *value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  return tensor_of(api_, value);
}

void *Call::output(const Shape &shape) const {
  OrtValue *value = nullptr;
  check(api_, api_.KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
  void *data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

Kernel::Kernel(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info)
    : definition_(definition), api_(api), where_(describe(definition, api, info)) {
  // A file that cannot run should say so when it is loaded. Codes stay where ONNX Runtime mapped them.
  Tensor codes = constant(api, info, definition.index(R::kCodes));
  Tensor scale = constant(api, info, definition.index(R::kScale));
  Tensor codebook = definition.has(R::kCodebook) ? constant(api, info, definition.index(R::kCodebook)) : Tensor{};
  if (!codes.given() || !scale.given() || (definition.has(R::kCodebook) && !codebook.given())) return;
  canonical_ = WeightInputs(std::move(codes), std::move(scale), std::move(codebook), {}).is_rf8();
}

WeightInputs Kernel::read_weights(const Call &call) const {
  return {call.input(R::kCodes), call.input(R::kScale), call.input(R::kCodebook), canonical_};
}

OrtStatus *Kernel::compute(OrtKernelContext *context) const noexcept {
  return guard(api_, where_, [&] { run(Call(api_, context, definition_)); });
}

}  // namespace ggpass
