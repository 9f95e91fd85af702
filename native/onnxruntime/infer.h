// Shape inference while a model is loaded.
#pragma once

#include "node.h"

namespace ggpass {

// Sets the output's type and shape where the inputs tell them. Whatever does not fit is left for the kernel to
// report: ONNX Runtime drops the status of this callback.
void infer_output(const Definition &definition, const OrtApi &api, OrtShapeInferContext *context);

}  // namespace ggpass
