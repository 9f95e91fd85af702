"""Check the CUDA kernels on this machine's GPU, time them against their peers, and say whether what must hold does.

    python benchmarks/cuda.py                   # checks, then times: some 15 minutes, most of them building kernels
    python benchmarks/cuda.py --checks-only
    python benchmarks/cuda.py --sanitize        # the checks under compute-sanitizer, where it is installed

First every kernel is compared with float64 on every class of shape. Then, for each layer, the kernels that can compute
it are timed and the fastest is kept (`CudaKernels.tune`), and ggpass and its peers run as CUDA graphs over weights that
no cache holds, in interleaved rounds. Writes `cuda.json` and `cuda.md` to `out/`.

Exit status: 0 where all holds, 1 where something does not, 77 without a GPU, with the reason.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder holds a file called cuda, and torch imports a package of that name: look into gpu/ instead.
    sys.path[0] = str(Path(__file__).parent / "gpu")
    from benchmark import app

    app()
