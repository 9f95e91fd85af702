"""Runs the CUDA kernels on the CPU, from the very text that a GPU's compiler gets.

`run(source, launch, arguments)` compiles the text of `source(variant)` with g++ and runs blocks one after another, a
block's threads as fibers that change at barriers and warp collectives. It reports as an `EmulatorFault`

1. an access outside its buffer or misaligned, a store to an input, an output written twice or read;
2. in shared memory: a race (no barrier between two threads' accesses), a read of what nobody wrote, any access to the
   target of an asynchronous copy that has not been waited for (copies are made when a wait demands them, no sooner);
3. a barrier that some threads do not reach, and a warp collective that some lanes do not reach;
4. an index outside a local array, signed overflow, a shift by too much.

It knows nothing of the kernels' families: a new one needs its arguments by name, and device functions whose `#else`
bodies use what `device.h` declares.
"""

from support.cuda_emulator.build import reason_against
from support.cuda_emulator.run import EmulatorFault, run

__all__ = ["EmulatorFault", "reason_against", "run"]
