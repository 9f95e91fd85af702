// MatMul: y = x · (codebook[codes] · scale)ᵀ + bias.
#include <algorithm>

#include "bias.h"
#include "node.h"
#include "product.h"

namespace ggpass {
namespace {

// In blocks of rows, so that the float32 copies stay small.
void multiply_halves(Product &product, const uint16_t *x, int64_t m, int64_t k, int64_t n, uint16_t *y) {
  Buffer<float> wide_x, wide_y;
  for (int64_t first = 0; first < m; first += product.block()) {
    const int64_t count = std::min(product.block(), m - first);
    half_to_float(x + first * k, count * k, wide_x.at_least(count * k));
    product.run(wide_x.get(), count, wide_y.at_least(count * n));
    float_to_half(wide_y.get(), count * n, y + first * n);
  }
}

class MatMul final : public Kernel {
 public:
  using Kernel::Kernel;

 protected:
  void run(const Call &call) const override {
    WeightInputs inputs = read_weights(call);
    const Weights weights = inputs.weights();
    const Tensor x = call.input(Role::kX);
    const int64_t n = weights.rows, k = weights.columns;
    if (x.shape.empty() || x.shape.back() != k)
      fail("x is %s; for codes %s it is (…, %lld)", text(x.shape).c_str(), text(inputs.shape()).c_str(),
           static_cast<long long>(k));
    const int64_t m = product_of_rows(x.shape);
    Buffer<float> room;
    const float *bias = read_bias(call.input(Role::kBias), n, room);
    Shape shape = x.shape;
    shape.back() = n;
    void *y = call.output(shape);
    if (m == 0 || n == 0) return;
    Product product(weights, bias, call.session);
    if (x.element == ORT_FLOAT)
      product.run(static_cast<const float *>(x.data), m, static_cast<float *>(y));
    else
      multiply_halves(product, static_cast<const uint16_t *>(x.data), m, k, n, static_cast<uint16_t *>(y));
  }

 private:
  static int64_t product_of_rows(const Shape &shape) { return ggpass::product(shape, 0, shape.size() - 1); }
};

}  // namespace

std::unique_ptr<Kernel> make_matmul(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info) {
  return std::make_unique<MatMul>(definition, api, info);
}

}  // namespace ggpass
