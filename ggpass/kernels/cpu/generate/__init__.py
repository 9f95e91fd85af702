"""The generator of the CPU kernels, in TVM TensorIR. Only `ggpass.kernels.cpu.library` imports it, when it builds."""
