"""Faults made by hand in a real kernel's text, which the emulator must see: a sound kernel shows nothing otherwise."""

import re

import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import random_linear
from support.cuda_emulator import EmulatorFault

from ggpass.formats.rf8 import RF8
from ggpass.kernels.cuda.variants import linear_variants

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())

#: What is changed, into what, and what is said of it.
MUTATIONS = {
    "waits for one group less": (r"ggp_later_wait\(2\)", "ggp_later_wait(3)", "under way"),
    "copies to another place": (r"ggp_later_copy\(to,", "ggp_later_copy((char*)to + 16,", "race|under way|nobody"),
    "no wait and no barrier before the sums": (r"  ggp_wait_0\(\);\n  __syncthreads\(\);", "", "race|under way"),
    "no barrier before the sums": (r"ggp_wait_0\(\);\n  __syncthreads\(\);", "ggp_wait_0();", "race|under way"),
    "no barrier after the sums": (r"__syncthreads\(\);(?![\s\S]*__syncthreads)", "", "race|nobody"),
    "copies what does not exist": (r"whole > 0 \? 16 : 0\);\n#endif", "16);\n#endif", "outside every buffer"),
    "a lane leaves early": (r"(  ggp_wait_0\(\);)", r"  if (threadIdx.x == 40) return;\n\1", "returned|returns"),
    "a row too many": (r"< n\)\) \{", "<= n)) {", "outside every buffer|second time"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_kernel_with_a_fault_is_caught(what: str) -> None:
    """No comparison of results is sure to see these."""
    from support.cuda_emulator import tensors

    from ggpass.kernels.cuda.compiler import Source

    variant = next(v for v in linear_variants("rf8", "bfloat16", 3, 9, 1040) if v.family == "small")
    pattern, replacement, message = MUTATIONS[what]
    sound = tensors.generated(variant)
    text, count = re.subn(pattern, replacement, sound.text)
    assert count, f"the source has no {pattern}"
    broken = Source(text, sound.entry, sound.parameters)
    case = random_linear(RF8, torch.bfloat16, 3, 9, 1040)
    with pytest.raises(EmulatorFault, match=message):
        tensors.linear(variant, case.x, case.codes, case.scale, RF8.codebook, case.bias, text=broken)
