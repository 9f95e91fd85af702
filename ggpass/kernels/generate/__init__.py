"""The generator of the CPU kernels, in TVM TensorIR. Only `ggpass.kernels.library` imports it, when it builds."""
