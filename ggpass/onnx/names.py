"""The names in a file: the domain of our operators, and which operator a format uses."""

from ggpass.formats.rf8 import RF8

DOMAIN = "ai.ggpass"

#: Of the whole domain; an operator whose meaning changes gets a new one.
VERSION = 1


def takes_codebook(format_name: str) -> bool:
    """Return True if a format's operators take its codebook as an operand; RF8's mean it."""
    return format_name != RF8.name


def operator_name(format_name: str, operation: str) -> str:
    """Return `RF8MatMul` for RF8, `CodebookMatMul` for others; `operation` is MatMul, Gather, Dequantize or Conv."""
    return ("Codebook" if takes_codebook(format_name) else "RF8") + operation
