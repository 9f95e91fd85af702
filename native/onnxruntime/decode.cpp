// Gather and Dequantize: some rows of codebook[codes] · scale, or all of them.
#include <algorithm>

#include "node.h"
#include "half.h"
#include "product.h"

namespace ggpass {
namespace {

constexpr int64_t kBlockFloats = 1 << 18;

// What both share: the type of the result, and rows of it.
class Decode : public Kernel {
 public:
  Decode(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info, OrtElement result)
      : Kernel(definition, api, info), result_(result) {
    const auto to = static_cast<OrtElement>(attribute(api, info, "to", ORT_FLOAT));
    if (to != ORT_FLOAT && to != ORT_FLOAT16)
      fail("the attribute to is %d; it is 1 (float) or 10 (float16)", static_cast<int>(to));
    if (to != result)
      fail("the attribute to says %s and the file's type of the result %s", name_of(to), name_of(result));
  }

 protected:
  void decode(const Weights &w, const int64_t *ids, int64_t count, void *out, Session &session) const {
    if (result_ == ORT_FLOAT) {
      decode_rows(w, ids, 0, count, static_cast<float *>(out), session);
      return;
    }
    const int64_t rows = std::max<int64_t>(1, kBlockFloats / std::max<int64_t>(1, w.columns));
    Buffer<float> block;
    for (int64_t first = 0; first < count; first += rows) {
      const int64_t some = std::min(rows, count - first), values = some * w.columns;
      decode_rows(w, ids == nullptr ? nullptr : ids + first, first, some, block.at_least(values), session);
      float_to_half(block.get(), values, static_cast<uint16_t *>(out) + first * w.columns);
    }
  }

 private:
  OrtElement result_;
};

class Dequantize final : public Decode {
 public:
  using Decode::Decode;

 protected:
  void run(const Call &call) const override {
    WeightInputs inputs = read_weights(call);
    const Weights weights = inputs.weights();
    decode(weights, nullptr, weights.rows, call.output(inputs.shape()), call.session);
  }
};

class Gather final : public Decode {
 public:
  using Decode::Decode;

 protected:
  void run(const Call &call) const override {
    WeightInputs inputs = read_weights(call);
    const Weights weights = inputs.weights();
    const Tensor ids = call.input(Role::kIds);
    const int64_t count = ids.count();
    Buffer<int64_t> rows;
    rows.at_least(count);
    for (int64_t i = 0; i < count; i++) rows.get()[i] = row(ids, i, weights.rows);
    Shape shape = ids.shape;
    shape.push_back(weights.columns);
    decode(weights, rows.get(), count, call.output(shape), call.session);
  }

 private:
  // As in ONNX's own Gather, −N … −1 count from the end.
  static int64_t row(const Tensor &ids, int64_t i, int64_t rows) {
    const int64_t id = ids.element == ORT_INT64 ? static_cast<const int64_t *>(ids.data)[i]
                                                : static_cast<const int32_t *>(ids.data)[i];
    if (id < -rows || id >= rows)
      fail("ids holds %lld, and codes have %lld rows: ids lie in [%lld, %lld)", static_cast<long long>(id),
           static_cast<long long>(rows), static_cast<long long>(-rows), static_cast<long long>(rows));
    return id < 0 ? id + rows : id;
  }
};

}  // namespace

std::unique_ptr<Kernel> make_gather(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info,
                                    OrtElement result) {
  return std::make_unique<Gather>(definition, api, info, result);
}

std::unique_ptr<Kernel> make_dequantize(const Definition &definition, const OrtApi &api, const OrtKernelInfo *info,
                                        OrtElement result) {
  return std::make_unique<Dequantize>(definition, api, info, result);
}

}  // namespace ggpass
