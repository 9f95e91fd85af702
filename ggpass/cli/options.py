"""The options that several commands share, each with its words."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ggpass.formats import Scheme


class Granularity(StrEnum):
    channel = "channel"
    tensor = "tensor"


class Scale(StrEnum):
    pow2 = "pow2"
    real = "real"


class Rounding(StrEnum):
    nearest = "nearest"
    paper = "paper"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPE_HELP = "Load the weights as float32, bfloat16, float16, or auto: as the checkpoint stores them."
DtypeOption = Annotated[Dtype, typer.Option(metavar="DTYPE", help=DTYPE_HELP)]

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory with safetensors weights.")
]
TargetName = Annotated[
    str, typer.Option("--target", "-t", metavar="FORMAT-DEVICE", help="`ggpass targets` lists them.")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Only weights whose name matches; may be repeated.")
]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Leave weights whose name matches; may be repeated.")
]
GranularityOption = Annotated[Granularity, typer.Option(help="One scale for each output channel, or for the tensor.")]
ScaleOption = Annotated[Scale | None, typer.Option(help="Powers of two, or real scales; the format's own if left out.")]
RoundingOption = Annotated[Rounding, typer.Option(help="`paper` is RF8's published greedy rounding.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def scheme_of(granularity: Granularity, scale: Scale | None, rounding: Rounding) -> "Scheme":
    """Return the scheme that the three options name."""
    from ggpass.formats import Scheme

    return Scheme(granularity.value, scale.value if scale else None, rounding.value)
