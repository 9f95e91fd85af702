// TVM's run-time functions that generated kernels call, over ONNX Runtime's threads: libtvm itself is not needed.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <utility>

#include "failure.h"
#include "run.h"

namespace ggpass {

thread_local const Session *Session::current = nullptr;

void Session::run(size_t count, void (*body)(void *, size_t), void *data) const {
  check(api_, api_.KernelContext_ParallelFor(context_, body, count, 0, data));
}

namespace {

// TVM's c_backend_api.h.
struct Group {
  void *sync;
  int32_t tasks;
};
using Lambda = int (*)(int task, Group *, void *data);

struct Launch {
  Lambda lambda;
  void *data;
  int32_t tasks;
  std::atomic<bool> failed{false};
};

void run_task(void *data, size_t task) {
  auto *launch = static_cast<Launch *>(data);
  Group group{nullptr, launch->tasks};
  if (launch->lambda(static_cast<int>(task), &group, launch->data) != 0) launch->failed = true;
}

int parallel_launch(Lambda lambda, void *data, int tasks) {
  const Session *session = Session::current;
  const int32_t wanted = session != nullptr ? std::max(session->tasks(), 1) : 1;
  Launch launch{lambda, data, tasks > 0 ? tasks : wanted};
  if (wanted > 1) {
    try {
      session->run(static_cast<size_t>(launch.tasks), run_task, &launch);
    } catch (const std::exception &) {
      return -1;
    }
  } else {
    for (int32_t task = 0; task < launch.tasks; task++) run_task(&launch, static_cast<size_t>(task));
  }
  return launch.failed ? -1 : 0;
}

void *workspace_alloc(int, int, uint64_t bytes, int, int) {
  void *memory = nullptr;
  return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
}

int workspace_free(int, int, void *memory) {
  std::free(memory);
  return 0;
}

thread_local std::string last_error;

}  // namespace

std::string take_kernel_error() { return std::exchange(last_error, {}); }

}  // namespace ggpass

// What the generated objects look for by name; the pointers are weak there, so that these decide.
extern "C" {
decltype(&ggpass::parallel_launch) __TVMBackendParallelLaunch = ggpass::parallel_launch;
decltype(&ggpass::workspace_alloc) __TVMBackendAllocWorkspace = ggpass::workspace_alloc;
decltype(&ggpass::workspace_free) __TVMBackendFreeWorkspace = ggpass::workspace_free;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  try {
    ggpass::last_error = kind;
    for (int32_t i = 0; i < count; i++) ggpass::last_error += parts[i] != nullptr ? parts[i] : "";
  } catch (const std::bad_alloc &) {
    ggpass::last_error.clear();
  }
}
}
