#include "run.h"

#include "failure.h"

namespace ggpass {

void run(Generated *kernel, std::initializer_list<Argument> arguments) {
  constexpr int32_t cpu = 1, tensor_pointer = 7;
  DLTensor tensors[8];
  Any values[8];
  if (arguments.size() > 8) fail("a kernel with %zu arguments", arguments.size());
  int32_t count = 0;
  for (const Argument &a : arguments) {
    tensors[count] = {a.data, cpu, 0, a.dimensions, a.code, a.bits, 1, a.shape, a.strides, 0};
    values[count] = {tensor_pointer, 0, &tensors[count]};
    count++;
  }
  Any result{};
  if (kernel(nullptr, values, count, &result) != 0) {
    const std::string reason = take_kernel_error();
    fail("a kernel did not run (%s); smaller batches need less memory", reason.empty() ? "no reason" : reason.c_str());
  }
}

}  // namespace ggpass
