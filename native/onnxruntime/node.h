// What a node of one of our operators is: its inputs by role, and one run of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "parallel.h"
#include "tensor.h"
#include "weights.h"

namespace ggpass {

enum class Role { kX, kIds, kCodes, kScale, kCodebook, kBias };

enum class Operation { kMatMul, kGather, kDequantize, kConv };

// An operator of the domain, as ggpass/onnx/schema.py writes it down.
struct Definition {
  const char *name;
  Operation operation;
  size_t inputs;
  Role roles[5];  // a bias comes last and may be left out

  bool has(Role role) const;
  size_t index(Role role) const;  // of a role that it has
};

// All of them; ends with a definition whose name is null.
extern const Definition kDefinitions[];

// One run of a node.
class Call {
 public:
  Call(const OrtApi &api, OrtKernelContext *context, const Definition &definition)
      : session(api, context), api_(api), context_(context), definition_(definition) {}

  // Not given where the operator has no such input or the node leaves it out.
  Tensor input(Role role) const;

  // The output's memory; its element type is the node's.
  void *output(const Shape &shape) const;

  mutable Session session;

 private:
  const OrtApi &api_;
  OrtKernelContext *context_;
  const Definition &definition_;
};

// A node ready to run. Several threads may run it at once.
class Kernel {
 public:
  Kernel(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info);
  virtual ~Kernel() = default;

  OrtStatus *compute(OrtKernelContext *context) const noexcept;

 protected:
  virtual void run(const Call &call) const = 0;

  WeightInputs read_weights(const Call &call) const;

  const Definition &definition_;

 private:
  const OrtApi &api_;
  std::string where_;
  std::optional<bool> canonical_;  // where the codes lie in the file, which is looked through only once
};

std::unique_ptr<Kernel> make_matmul(const Definition &, const OrtApi &, const OrtKernelInfo *);
std::unique_ptr<Kernel> make_gather(const Definition &, const OrtApi &, const OrtKernelInfo *, OrtElement result);
std::unique_ptr<Kernel> make_dequantize(const Definition &, const OrtApi &, const OrtKernelInfo *, OrtElement result);
std::unique_ptr<Kernel> make_conv(const Definition &, const OrtApi &, const OrtKernelInfo *);

// RF8MatMul "name of the node", for messages.
std::string describe(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info);

// Fails where an input is missing or of a type that the operator does not take, or the node asks for a later version.
void check_node(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info);

}  // namespace ggpass
