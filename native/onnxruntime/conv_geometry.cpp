#include "conv_geometry.h"

namespace ggpass {
namespace {

constexpr int64_t kLongest = int64_t{1} << 31;  // keeps sums of pads and reaches far from overflow

void fill(const char *name, const std::vector<int64_t> &from, size_t count, int64_t least, int64_t otherwise,
          int64_t *to) {
  if (!from.empty() && from.size() != count)
    fail("%s has %zu entries; kernel_shape asks for %zu", name, from.size(), count);
  for (size_t i = 0; i < count; i++) {
    to[i] = from.empty() ? otherwise : from[i];
    if (to[i] < least || to[i] >= kLongest)
      fail("%s holds %lld; its entries are %lld or more", name, static_cast<long long>(to[i]),
           static_cast<long long>(least));
  }
}

}  // namespace

Window Window::make(std::vector<int64_t> kernel, std::vector<int64_t> strides, std::vector<int64_t> pads,
                    std::vector<int64_t> dilations, int64_t groups) {
  Window w{kernel.size(), {1, 1}, {1, 1}, {1, 1}, {0, 0}, {0, 0}, groups};
  if (w.axes != 1 && w.axes != 2)
    fail("kernel_shape has %zu entries; one or two spatial dimensions are supported", w.axes);
  if (groups < 1) fail("group is %lld; it is 1 or more", static_cast<long long>(groups));
  const size_t skip = 2 - w.axes;
  int64_t both[4] = {};
  fill("kernel_shape", kernel, w.axes, 1, 1, w.kernel + skip);
  fill("strides", strides, w.axes, 1, 1, w.stride + skip);
  fill("dilations", dilations, w.axes, 1, 1, w.dilation + skip);
  fill("pads", pads, 2 * w.axes, 0, 0, both);
  for (size_t i = 0; i < w.axes; i++) {
    w.begin[skip + i] = both[i];
    w.end[skip + i] = both[w.axes + i];
  }
  return w;
}

int64_t Window::count(int axis, int64_t length) const {
  const int64_t room = length + begin[axis] + end[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
  return room < 0 ? 0 : room / stride[axis] + 1;
}

Geometry::Geometry(const Window &w, const Shape &x, const Shape &codes) : window(w) {
  if (x.size() != 2 + w.axes)
    fail("x is %s; with %zu entries in kernel_shape it has %zu dimensions", text(x).c_str(), w.axes, 2 + w.axes);
  batch = x[0], channels = x[1], rows = codes[0];
  size[0] = w.axes == 2 ? x[2] : 1;
  size[1] = x.back();
  if (channels % w.groups != 0 || rows % w.groups != 0)
    fail("group is %lld, which does not divide the %lld channels of x and the %lld of the codes",
         static_cast<long long>(w.groups), static_cast<long long>(channels), static_cast<long long>(rows));
  int64_t expected;
  if (__builtin_mul_overflow(group_channels(), w.taps(), &expected) || expected != codes[1])
    fail("codes are %s; for x %s and this kernel_shape they have %lld columns", text(codes).c_str(), text(x).c_str(),
         static_cast<long long>(expected));
  for (int axis = 0; axis < 2; axis++) {
    out[axis] = w.count(axis, size[axis]);
    if (out[axis] < 1) fail("x is %s, shorter than the kernel; use larger inputs or more padding", text(x).c_str());
  }
}

Shape Geometry::output_shape() const {
  Shape shape{batch, rows};
  if (window.axes == 2) shape.push_back(out[0]);
  shape.push_back(out[1]);
  return shape;
}

}  // namespace ggpass
