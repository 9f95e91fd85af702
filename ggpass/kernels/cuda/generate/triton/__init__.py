"""The GEMM in Triton, for architectures whose tensor cores TVM's kernels do not fill. Only `build` imports it."""
