"""The generator of the CUDA kernels, in TVM TensorIR. Only `ggpass.kernels.cuda.cubins` imports it, when it builds."""
