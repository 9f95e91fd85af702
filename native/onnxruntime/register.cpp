// RegisterCustomOps, the one function that ONNX Runtime looks for, and the callbacks behind each operator.
//
// ONNX Runtime picks a kernel by the types of a node's inputs and infers the type of its output from that choice. So
// each operator is registered once for every type of its first input, types it does not take included: for those the
// kernel is made in order to say what is wrong. The other inputs are declared to be of any type for the same reason.
#include <deque>
#include <iterator>
#include <map>
#include <mutex>

#include "infer.h"
#include "kernels.h"
#include "node.h"

namespace ggpass {
namespace {

// One registration. ONNX Runtime hands its address back to every callback.
struct Op : OrtCustomOp {
  const OrtApi *api;
  const Definition *definition;
  OrtElement first, result;
};

const Op &self(const OrtCustomOp *op) { return *static_cast<const Op *>(op); }

std::unique_ptr<Kernel> make(const Op &op, const OrtKernelInfo *info) {
  check_node(*op.definition, *op.api, info);
  switch (op.definition->operation) {
    case Operation::kMatMul:
      return make_matmul(*op.definition, *op.api, info);
    case Operation::kGather:
      return make_gather(*op.definition, *op.api, info, op.result);
    case Operation::kDequantize:
      return make_dequantize(*op.definition, *op.api, info, op.result);
    case Operation::kConv:
      return make_conv(*op.definition, *op.api, info);
  }
  return nullptr;
}

OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  *kernel = nullptr;
  std::string where;
  OrtStatus *status =
      guard(*api, self(op).definition->name, [&] { where = describe(*self(op).definition, *api, info); });
  if (status != nullptr) return status;
  return guard(*api, where, [&] { *kernel = make(self(op), info).release(); });
}

// Called for the first registration of an operator, whatever the types of the node.
OrtStatus *infer(const OrtCustomOp *op, OrtShapeInferContext *context) {
  const OrtApi &api = *self(op).api;
  OrtStatus *status =
      guard(api, {}, [&] { infer_output(*self(op).definition, api, context); });
  if (status != nullptr) api.ReleaseStatus(status);  // nobody would
  return nullptr;
}

OrtCustomOp callbacks() {
  OrtCustomOp op{};
  op.version = kOrtVersion;
  op.GetName = [](const OrtCustomOp *o) { return self(o).definition->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return nullptr; };
  op.GetInputType = [](const OrtCustomOp *o, size_t i) { return i == 0 ? self(o).first : ORT_UNDEFINED; };
  op.GetInputTypeCount = [](const OrtCustomOp *o) { return self(o).definition->inputs; };
  op.GetOutputType = [](const OrtCustomOp *o, size_t) { return self(o).result; };
  op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return 1; };
  op.KernelDestroy = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp *o, size_t i) {
    return self(o).definition->roles[i] == Role::kBias ? ORT_OPTIONAL : ORT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = [](void *kernel, OrtKernelContext *context) {
    return static_cast<const Kernel *>(kernel)->compute(context);
  };
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const OrtCustomOp *) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp *) { return 1; };
  return op;
}

constexpr OrtElement kEveryType[] = {
    ORT_FLOAT, ORT_FLOAT16, ORT_DOUBLE, ORT_BFLOAT16, ORT_INT8,   ORT_INT16, ORT_INT32,
    ORT_INT64, ORT_UINT8,   ORT_UINT16, ORT_UINT32,   ORT_UINT64, ORT_BOOL,  ORT_STRING,
};

// The operators as one run time sees them; made at the first registration and kept, since sessions borrow them.
struct Registered {
  std::deque<Op> ops;
  OrtCustomOpDomain *domain = nullptr;
  // Until 1.24 ONNX Runtime dereferences the type of an input that a node names "", before it calls our inference:
  // there, operators with an optional input do without, and only lose the shape.
  bool infers_around_absent = true;
};

void add(const OrtApi &api, Registered &all, const Definition &definition, OrtElement first, OrtElement result) {
  all.ops.push_back(Op{callbacks(), &api, &definition, first, result});
  if (!all.infers_around_absent && definition.has(Role::kBias)) all.ops.back().InferOutputShapeFn = nullptr;
  check(api, api.CustomOpDomain_Add(all.domain, &all.ops.back()));
}

void add_all(const OrtApi &api, Registered &all) {
  check(api, api.CreateCustomOpDomain("ai.ggpass", &all.domain));
  for (const Definition *definition = kDefinitions; definition->name != nullptr; definition++)
    for (const OrtElement first : kEveryType) {
      const bool decodes =
          definition->operation == Operation::kGather || definition->operation == Operation::kDequantize;
      add(api, all, *definition, first, decodes ? ORT_FLOAT : first);
      if (decodes) add(api, all, *definition, first, ORT_FLOAT16);
    }
}

// A process may hold several run times, each with its own table.
OrtCustomOpDomain *domain_for(const OrtApi &api, const OrtApiBase &base) {
  static std::mutex mutex;
  static auto &known = *new std::map<const OrtApi *, Registered>;
  const std::lock_guard<std::mutex> lock(mutex);
  Registered &all = known[&api];
  if (all.domain == nullptr) {
    all.infers_around_absent = base.GetApi(24) != nullptr;
    add_all(api, all);
  }
  return all.domain;
}

}  // namespace
}  // namespace ggpass

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                               const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(kOrtVersion);
  if (api == nullptr) {
    // The first entries are in every version, and this message needs no more.
    const OrtApi *oldest = base->GetApi(1);
    const std::string message = "[ggpass] this ONNX Runtime is " + std::string(base->GetVersionString()) +
                                "; the operators of ggpass need 1.21 or later: pip install -U onnxruntime";
    return oldest == nullptr ? nullptr : oldest->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  return ggpass::guard(*api, "the operators cannot be registered", [&] {
    ggpass::check(*api, api->AddCustomOpDomain(options, ggpass::domain_for(*api, *base)));
  });
}
