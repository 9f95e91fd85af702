"""The names in a file: the domain of our operators, and which operator a format uses."""

DOMAIN = "ai.ggpass"

#: Of the whole domain; an operator whose meaning changes gets a new one.
VERSION = 1


def operator_name(format_name: str, operation: str) -> str:
    """`RF8MatMul` for rf8, `CodebookMatMul` for every other format; `operation` is MatMul, Gather, Dequantize, Conv."""
    return ("RF8" if format_name == "rf8" else "Codebook") + operation
