// Loops on ONNX Runtime's own threads, whose number its session options set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ort_abi.h"

namespace ggpass {

// Where a node is running. While it lives, the parallel loops that generated kernels start on this thread run on
// the session's threads; without one, or for too little work (multiplications) to be worth waking them, inline.
class Session {
 public:
  Session(const OrtApi &api, const OrtKernelContext *context) : api_(api), context_(context), outer_(current) {
    current = this;
  }
  ~Session() { current = outer_; }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

  void set_work(int64_t work) { work_ = work; }

  // The number of threads is not to be had from ONNX Runtime, but each takes the next task as it becomes free: more
  // tasks than threads keep all of them busy to the end. A task is some microseconds of work.
  int32_t tasks() const { return static_cast<int32_t>(std::min<int64_t>(work_ >> 15, 256)); }

  // body(0) ... body(count - 1), which must not throw.
  template <typename Body>
  void each(int64_t count, const Body &body) const {
    if (count > 1 && tasks() > 1) {
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
