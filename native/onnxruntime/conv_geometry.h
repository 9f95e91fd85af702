// Where the windows of a convolution lie; one dimension is two with a height of 1.
#pragma once

#include <cstdint>
#include <vector>

#include "ort_abi.h"
#include "tensor.h"

namespace ggpass {

// The attributes of a Conv node, as pairs (height, width).
struct Window {
  size_t axes;
  int64_t kernel[2], stride[2], dilation[2], begin[2], end[2];
  int64_t groups;

  // Fails, naming the attribute, where they do not make a window.
  static Window make(std::vector<int64_t> kernel, std::vector<int64_t> strides, std::vector<int64_t> pads,
                     std::vector<int64_t> dilations, int64_t groups);

  int64_t taps() const { return kernel[0] * kernel[1]; }

  // Windows along an axis of `length`: ⌊(length + pads − dilation · (kernel − 1) − 1) / stride⌋ + 1, or none.
  int64_t count(int axis, int64_t length) const;
};

// One convolution: (batch, channels, height, width) with `rows` output channels.
struct Geometry {
  Window window;
  int64_t batch, channels, size[2], rows, out[2];

  // Fails where x and the codes do not fit the window.
  Geometry(const Window &window, const Shape &x, const Shape &codes);

  Shape output_shape() const;
  int64_t in_plane() const { return size[0] * size[1]; }
  int64_t out_plane() const { return out[0] * out[1]; }
  int64_t group_channels() const { return channels / window.groups; }
  int64_t group_rows() const { return rows / window.groups; }
  int64_t depth() const { return group_channels() * window.taps(); }
};

}  // namespace ggpass
