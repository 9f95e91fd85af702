// Loops on ONNX Runtime's own threads, whose number its session options set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ort_abi.h"

namespace ggpass {

// Where a node is running. While it lives, the parallel loops that generated kernels start on this thread run on
// the session's threads; without one, or for `work` (multiplications) too small to be worth waking them, inline.
class Session {
 public:
  Session(const OrtApi &api, const OrtKernelContext *context) : api_(api), context_(context), outer_(current) {
    current = this;
  }
  ~Session() { current = outer_; }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

  void set_work(int64_t work) { work_ = work; }
  bool large() const { return work_ >= 1 << 16; }

  // body(0) ... body(count - 1), which must not throw.
  template <typename Body>
  void each(int64_t count, const Body &body) const {
    if (count > 1 && large()) {
      run(static_cast<size_t>(count), [](void *data, size_t i) {
        (*static_cast<const Body *>(data))(static_cast<int64_t>(i));
      }, const_cast<Body *>(&body));
      return;
    }
    for (int64_t i = 0; i < count; i++) body(i);
  }

  void run(size_t count, void (*body)(void *, size_t), void *data) const;

  static thread_local const Session *current;

 private:
  const OrtApi &api_;
  const OrtKernelContext *context_;
  const Session *outer_;
  int64_t work_ = INT64_MAX;
};

}  // namespace ggpass
