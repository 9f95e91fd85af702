"""Generated kernels. Only `generate` imports tvm, and only when something must be built."""
