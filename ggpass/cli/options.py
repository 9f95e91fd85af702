"""The options that several commands share, each with its words."""

from pathlib import Path
from typing import Annotated, Literal

import typer

DTYPE_HELP = "Load the weights as float32, bfloat16, float16, or auto: as the checkpoint stores them."
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(metavar="DTYPE", help=DTYPE_HELP)]

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
Granularity = Annotated[
    Literal["channel", "tensor"], typer.Option(help="One scale for each output channel, or for the tensor.")
]
Scale = Annotated[
    Literal["pow2", "real"] | None, typer.Option(help="Powers of two, or real scales; the format's own if left out.")
]
Rounding = Annotated[str, typer.Option(help="`nearest`, or `paper`: RF8's published greedy rounding.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

#: Every command that writes a file refuses an existing one without it.
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
