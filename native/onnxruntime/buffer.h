// Memory that is not filled with zeros first.
#pragma once

#include <cstdint>
#include <memory>

namespace ggpass {

template <typename T>
class Buffer {
 public:
  // At least `count` elements; what was there before is lost.
  T *at_least(int64_t count) {
    if (count > size_) {
      memory_.reset();
      memory_.reset(new T[static_cast<size_t>(count)]);
      size_ = count;
    }
    return memory_.get();
  }
  T *get() const { return memory_.get(); }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

}  // namespace ggpass
