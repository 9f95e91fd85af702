// Conv: as a product with the windows of x laid out as rows, or directly where a group has too few output channels
// for a product.
#include <algorithm>
#include <cstring>

#include "bias.h"
#include "conv_geometry.h"
#include "node.h"
#include "product.h"

namespace ggpass {
namespace {

constexpr int64_t kFewRows = 8;

// The taps [first, last) of a kernel that hit x, for a window that begins at `origin`.
struct Taps {
  int64_t first, last;

  Taps(int64_t origin, int64_t count, int64_t dilation, int64_t length) {
    first = origin >= 0 ? 0 : std::min(count, (-origin + dilation - 1) / dilation);
    last = std::clamp((length - origin + dilation - 1) / dilation, first, count);
  }
};

// row = the values of x, zero outside, under window `position` of the batch: channels, then taps.
void lay_out(const Geometry &g, const float *x, int64_t group, int64_t position, float *row) {
  const Window &w = g.window;
  const int64_t image = position / g.out_plane(), rest = position % g.out_plane();
  const int64_t top = rest / g.out[1] * w.stride[0] - w.begin[0], left = rest % g.out[1] * w.stride[1] - w.begin[1];
  const Taps down(top, w.kernel[0], w.dilation[0], g.size[0]), along(left, w.kernel[1], w.dilation[1], g.size[1]);
  const bool whole = down.last - down.first == w.kernel[0] && along.last - along.first == w.kernel[1];
  if (!whole) std::memset(row, 0, static_cast<size_t>(g.depth()) * sizeof(float));
  const float *plane = x + (image * g.channels + group * g.group_channels()) * g.in_plane();
  for (int64_t c = 0; c < g.group_channels(); c++, plane += g.in_plane(), row += w.taps())
    for (int64_t i = down.first; i < down.last; i++) {
      const float *line = plane + (top + i * w.dilation[0]) * g.size[1] + left;
      for (int64_t j = along.first; j < along.last; j++) row[i * w.kernel[1] + j] = line[j * w.dilation[1]];
    }
}

void by_product(const Geometry &g, const Weights &weights, const float *bias, const float *x, float *y,
                Session &session) {
  const int64_t positions = g.batch * g.out_plane(), depth = g.depth(), rows = g.group_rows();
  Buffer<float> windows, block;
  for (int64_t group = 0; group < g.window.groups; group++) {
    const int64_t first_row = group * rows;
    Product product(weights.slice(first_row, rows), bias == nullptr ? nullptr : bias + first_row, session);
    for (int64_t first = 0; first < positions; first += product.block()) {
      const int64_t count = std::min(product.block(), positions - first);
      float *laid_out = windows.at_least(count * depth), *out = block.at_least(count * rows);
      session.set_work(count * depth);
      session.each(count, [&](int64_t i) { lay_out(g, x, group, first + i, laid_out + i * depth); });
      product.run(laid_out, count, out);
      session.each(rows, [&](int64_t n) {
        for (int64_t i = 0; i < count; i++) {
          const int64_t image = (first + i) / g.out_plane(), position = (first + i) % g.out_plane();
          y[(image * g.rows + first_row + n) * g.out_plane() + position] = out[i * rows + n];
        }
      });
    }
  }
}

// y of one image and output channel, tap by tap along whole lines.
void one_plane(const Geometry &g, const float *weights, float bias, const float *x, int64_t image, int64_t row,
               float *y) {
  const Window &w = g.window;
  std::fill(y, y + g.out_plane(), bias);
  const int64_t group = row / g.group_rows();
  const float *plane = x + (image * g.channels + group * g.group_channels()) * g.in_plane();
  for (int64_t c = 0; c < g.group_channels(); c++, plane += g.in_plane())
    for (int64_t tap = 0; tap < w.taps(); tap++) {
      const float weight = weights[row * g.depth() + c * w.taps() + tap];
      const int64_t down = tap / w.kernel[1] * w.dilation[0] - w.begin[0];
      const int64_t along = tap % w.kernel[1] * w.dilation[1] - w.begin[1];
      // Seen from the tap, outputs are the taps of a window with x's stride as its dilation.
      const Taps lines(down, g.out[0], w.stride[0], g.size[0]), columns(along, g.out[1], w.stride[1], g.size[1]);
      for (int64_t i = lines.first; i < lines.last; i++) {
        const float *from = plane + (i * w.stride[0] + down) * g.size[1] + along;
        float *to = y + i * g.out[1];
        for (int64_t j = columns.first; j < columns.last; j++) to[j] += weight * from[j * w.stride[1]];
      }
    }
}

void directly(const Geometry &g, const Weights &weights, const float *bias, const float *x, float *y,
              Session &session) {
  Buffer<float> decoded;
  decode_rows(weights, nullptr, 0, weights.rows, decoded.at_least(weights.rows * g.depth()), session);
  session.set_work(g.batch * g.rows * g.out_plane() * g.depth());
  session.each(g.batch * g.rows, [&](int64_t i) {
    const int64_t image = i / g.rows, row = i % g.rows;
    one_plane(g, decoded.get(), bias == nullptr ? 0 : bias[row], x, image, row, y + i * g.out_plane());
  });
}

class Conv final : public Kernel {
 public:
  Conv(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info)
      : Kernel(definition, api, info),
        window_(Window::make(attributes(api, info, "kernel_shape"), attributes(api, info, "strides"),
                             attributes(api, info, "pads"), attributes(api, info, "dilations"),
                             attribute(api, info, "group", 1))) {}

 protected:
  void run(const Call &call) const override {
    WeightInputs inputs = read_weights(call);
    const Weights weights = inputs.weights();
    const Tensor x = call.input(Role::kX);
    const Geometry g(window_, x.shape, inputs.shape());
    Buffer<float> bias_room;
    const float *bias = read_bias(call.input(Role::kBias), g.rows, bias_room);
    const Shape shape = g.output_shape();
    const int64_t count = product(shape, 0, shape.size());
    void *y = call.output(shape);
    if (count == 0) return;
    if (x.element == ORT_FLOAT) {
      convolve(g, weights, bias, static_cast<const float *>(x.data), static_cast<float *>(y), call.session);
      return;
    }
    Buffer<float> wide_x, wide_y;
    half_to_float(static_cast<const uint16_t *>(x.data), x.count(), wide_x.at_least(x.count()));
    convolve(g, weights, bias, wide_x.get(), wide_y.at_least(count), call.session);
    float_to_half(wide_y.get(), count, static_cast<uint16_t *>(y));
  }

 private:
  static void convolve(const Geometry &g, const Weights &weights, const float *bias, const float *x, float *y,
                       Session &session) {
    (g.window.groups > 1 && g.group_rows() < kFewRows ? directly : by_product)(g, weights, bias, x, y, session);
  }

  Window window_;
};

}  // namespace

std::unique_ptr<Kernel> make_conv(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info) {
  return std::make_unique<Conv>(definition, api, info);
}

}  // namespace ggpass
