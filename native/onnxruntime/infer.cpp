#include "infer.h"

#include <atomic>
#include <optional>

#include "conv_geometry.h"

namespace ggpass {
namespace {

// A length, or a name for one; -1 without a name is not known.
struct Dim {
  int64_t length = -1;
  std::string name;
};
using Dims = std::vector<Dim>;

// Names for lengths that are not known. ONNX Runtime takes equal names for equal lengths, so each is new.
std::string new_name() {
  static std::atomic<uint64_t> count{0};
  return "ggpass_unknown_" + std::to_string(++count);
}

class Inference {
 public:
  Inference(const Definition &definition, const OrtApi &api, OrtShapeInferContext *context)
      : definition_(definition), api_(api), context_(context) {}

  // Nothing where the rank is not known, which reads as rank 0; a true scalar is then left alone too.
  std::optional<Dims> input(Role role) const {
    size_t count = 0, rank = 0;
    check(api_, api_.ShapeInferContext_GetInputCount(context_, &count));
    const size_t index = definition_.index(role);
    if (index >= count) return {};
    OrtTensorTypeAndShapeInfo *info = nullptr;
    check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, index, &info));
    check(api_, api_.GetDimensionsCount(info, &rank));
    if (rank == 0) return {};
    std::vector<int64_t> lengths(rank);
    std::vector<const char *> names(rank);
    check(api_, api_.GetDimensions(info, lengths.data(), rank));
    check(api_, api_.GetSymbolicDimensions(info, names.data(), rank));
    Dims dims(rank);
    for (size_t i = 0; i < rank; i++) {
      dims[i].length = lengths[i];
      if (lengths[i] < 0 && names[i] != nullptr) dims[i].name = names[i];
    }
    return dims;
  }

  std::vector<int64_t> attributes(const char *name) const {
    const OrtOpAttr *found = nullptr;
    if (OrtStatus *status = api_.ShapeInferContext_GetAttribute(context_, name, &found)) {
      api_.ReleaseStatus(status);
      return {};
    }
    int64_t values[16];
    size_t bytes = 0;
    check(api_, api_.ReadOpAttr(found, ORT_ATTRIBUTE_INTS, values, sizeof values, &bytes));
    return {values, values + bytes / sizeof *values};
  }

  int64_t attribute(const char *name, int64_t otherwise) const {
    const OrtOpAttr *found = nullptr;
    if (OrtStatus *status = api_.ShapeInferContext_GetAttribute(context_, name, &found)) {
      api_.ReleaseStatus(status);
      return otherwise;
    }
    int64_t value = otherwise;
    size_t bytes = 0;
    check(api_, api_.ReadOpAttr(found, ORT_ATTRIBUTE_INT, &value, sizeof value, &bytes));
    return value;
  }

  OrtElement type_of_first() const {
    OrtTensorTypeAndShapeInfo *info = nullptr;
    OrtElement element = ORT_UNDEFINED;
    check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, 0, &info));
    check(api_, api_.GetTensorElementType(info, &element));
    return element;
  }

  // Without a name, a length of -1 would be taken at its word.
  void set(Dims dims, OrtElement element) const {
    std::vector<int64_t> lengths;
    std::vector<const char *> names;
    for (Dim &dim : dims) {
      if (dim.length < 0 && dim.name.empty()) dim.name = new_name();
      lengths.push_back(dim.length);
      names.push_back(dim.name.c_str());
    }
    OrtTensorTypeAndShapeInfo *info = nullptr;
    check(api_, api_.CreateTensorTypeAndShapeInfo(&info));
    OrtStatus *status = api_.SetTensorElementType(info, element);
    if (status == nullptr) status = api_.SetDimensions(info, lengths.data(), lengths.size());
    if (status == nullptr) status = api_.SetSymbolicDimensions(info, names.data(), names.size());
    if (status == nullptr) status = api_.ShapeInferContext_SetOutputTypeShape(context_, 0, info);
    api_.ReleaseTensorTypeAndShapeInfo(info);
    check(api_, status);
  }

 private:
  const Definition &definition_;
  const OrtApi &api_;
  OrtShapeInferContext *context_;
};

std::optional<Dims> convolved(const Inference &inference, const Dims &x, const Dim &rows) {
  const Window window =
      Window::make(inference.attributes("kernel_shape"), inference.attributes("strides"), inference.attributes("pads"),
                   inference.attributes("dilations"), inference.attribute("group", 1));
  if (x.size() != 2 + window.axes) return {};
  Dims y{x[0], rows};
  for (size_t i = 2; i < x.size(); i++) {
    const auto axis = static_cast<int>(i - window.axes);
    Dim windows;
    if (x[i].length >= 0) windows.length = window.count(axis, x[i].length);
    y.push_back(windows);
  }
  return y;
}

std::optional<Dims> inferred(const Definition &definition, const Inference &inference) {
  const std::optional<Dims> codes = inference.input(Role::kCodes);
  if (!codes || codes->size() != 2) return {};
  const Dim &rows = (*codes)[0], &columns = (*codes)[1];
  switch (definition.operation) {
    case Operation::kDequantize:
      return codes;
    case Operation::kGather: {
      std::optional<Dims> ids = inference.input(Role::kIds);
      if (ids) ids->push_back(columns);
      return ids;
    }
    case Operation::kMatMul: {
      std::optional<Dims> x = inference.input(Role::kX);
      if (x) x->back() = rows;
      return x;
    }
    case Operation::kConv: {
      const std::optional<Dims> x = inference.input(Role::kX);
      return x ? convolved(inference, *x, rows) : std::nullopt;
    }
  }
  return {};
}

}  // namespace

void infer_output(const Definition &definition, const OrtApi &api, OrtShapeInferContext *context) {
  const Inference inference(definition, api, context);
  const bool decodes = definition.operation == Operation::kGather || definition.operation == Operation::kDequantize;
  const OrtElement result =
      decodes ? static_cast<OrtElement>(inference.attribute("to", ORT_FLOAT)) : inference.type_of_first();
  if (const std::optional<Dims> dims = inferred(definition, inference)) inference.set(*dims, result);
}

}  // namespace ggpass
