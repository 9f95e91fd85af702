"""The generator of the CUDA kernels, in TVM TensorIR. Only the target `cuda` imports it, when it builds."""
