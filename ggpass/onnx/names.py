"""The names in a file: the domain of our operators, which operator a format uses, and new names beside the model's."""

from typing import TYPE_CHECKING

from ggpass.formats.rf8 import RF8

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "ai.ggpass"

#: Of the whole domain; an operator whose meaning changes gets a new one.
VERSION = 1


def takes_codebook(format_name: str) -> bool:
    """Return True if a format's operators take its codebook as an operand; RF8's mean it."""
    return format_name != RF8.name


def operator_name(format_name: str, operation: str) -> str:
    """Return `RF8MatMul` for RF8, `CodebookMatMul` for others; `operation` is MatMul, Gather, Dequantize or Conv."""
    return ("Codebook" if takes_codebook(format_name) else "RF8") + operation


class Names:
    """Gives names that no value of a model has, in any of its graphs: one model, one Names."""

    def __init__(self, model: "ir.Model") -> None:
        self._taken: set[str | None] = set()
        for graph in model.graphs():
            self._taken.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
            self._taken.update(value.name for node in graph for value in (*node.inputs, *node.outputs) if value)

    def new(self, wanted: str) -> str:
        """Return the wanted name, with a number behind it if it is taken."""
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
