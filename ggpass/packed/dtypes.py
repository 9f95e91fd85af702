"""safetensors' names of dtypes, torch's dtypes, and the bytes between them."""

import math

import numpy as np
import torch
from torch import Tensor

from ggpass.errors import FormatError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Bits of an element by safetensors' name of its dtype; torch has no 4- and 6-bit floats.
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}

#: The dtypes of weights that a format or a grid takes.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


class Sized:
    """A tensor by its dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return bytes that dtype and shape ask for; 0 for a dtype that is not in DTYPE_BITS."""
        return (self.size * DTYPE_BITS.get(self.dtype, 0) + 7) // 8


def name_of(tensor: Tensor) -> str:
    """safetensors' name of a tensor's dtype.

    Raises:
        FormatError: a dtype that such a file cannot hold (quantized, complex128).
    """
    if tensor.dtype not in NAMES:
        raise FormatError(f"{str(tensor.dtype).removeprefix('torch.')} has no place in a safetensors file; convert it")
    return NAMES[tensor.dtype]


def as_tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that lies in these bytes; it shares their memory.

    Raises:
        FormatError: torch has no such dtype (the 4- and 6-bit floats).
    """
    if dtype not in TORCH_DTYPES:
        raise FormatError(f"torch has no dtype for {dtype}; `ggpass unpack` restores the file as it was")
    if not data.size:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])  # torch views no empty bytes as wider elements
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(shape)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor, (nbytes,) uint8; a view where it is contiguous and on the CPU."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def planes_of(dtype: str) -> tuple[int, bool]:
    """How lossless coding splits a dtype: the bytes of one element, and whether its sign moves behind the mantissa."""
    bits = DTYPE_BITS[dtype]
    if dtype == "C64":
        return 4, True  # two float32
    return (bits // 8, dtype in WEIGHT_DTYPES) if bits % 8 == 0 else (1, False)
