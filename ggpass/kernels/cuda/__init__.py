"""The run time of the CUDA kernels, and their description in numbers: importing needs no TVM, compiler or GPU."""
