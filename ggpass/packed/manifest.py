"""The manifest of a packed file: what each payload stands for, in the metadata of a safetensors header.

`ggpass` holds the JSON below, `ggpass.check` the CRC-32C of the length and the header, its own eight digits taken as
zeros. Payloads keep the names of the tensors they stand for.

    {"version": 1,
     "tensors": {name: {"kind": "codes",    "dtype", "shape", "check", "format": "rf8", "codebook": hash,
                        "transposed": true where the rows of codes are the columns of the matrix,
                        "stack": how many rows of codes a stack of matrices has, all of them together}
                       {"kind": "grid",     "dtype", "shape", "check", "step": float}
                       {"kind": "lossless", "dtype", "shape", "check"}
                       {"kind": "plain",    "check"},
                        of each kind also "persistent": false for a buffer that no state_dict holds},
     "aliases": {name: name of the equal tensor that is stored},
     "kernels": {name: the CRC-32C of its bytes}}

`kernels` are GPU kernels that the file carries, as bytes that are no tensors of the model; they make the version 2,
which readers that know no kernels refuse. A file without them stays version 1.

`check` ties a payload to its name: the CRC-32C of a plain tensor's bytes, or of the header checksums of the coded
arrays in it, which in turn cover their chunks. The order of `tensors` is that of the source file.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ggpass.errors import FormatError
from ggpass.formats import FORMATS, Format
from ggpass.packed.codec.native import crc32c
from ggpass.packed.dtypes import Sized
from ggpass.packed.layout import Layout, check_dtype_and_shape
from ggpass.packed.untrusted import parse_json

#: What this ggpass reads: files without kernels, and files with them.
VERSIONS = (1, 2)
KEY = "ggpass"
CHECK_KEY = "ggpass.check"
KINDS = ("codes", "grid", "lossless", "plain")

_CHECK_FIELD = re.compile(rb'"ggpass\.check":"([0-9a-f]{8})"')


def codebook_hash(fmt: Format) -> str:
    """Return the first 16 hex digits of the SHA-256 of the codebook's 256 little-endian float32 values."""
    return hashlib.sha256(fmt.codebook.numpy().astype("<f4").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Stored(Sized):
    """What the manifest says of one tensor.

    Attributes:
        kind: `codes`, `grid`, `lossless` or `plain`.
        dtype, shape: of the tensor that comes back.
        check: ties the payload to this entry.
        format: codes: the format's name.
        codebook: codes: the hash of its codebook.
        step: grid: the distance of the grid's points.
        transposed: codes: they are those of the transposed matrix, a scale for each of its rows.
        stack: codes: how many rows there are, if they are not those of the first dimension (a stack of matrices).
        persistent: False: a buffer that the model's state_dict leaves out, kept for models without values.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    check: int = 0
    format: str = ""
    codebook: str = ""
    step: float = 0.0
    transposed: bool = False
    persistent: bool = True
    stack: int = 0

    @property
    def rows(self) -> int:
        """codes: how many output channels there are."""
        return self.stack or self.shape[1 if self.transposed else 0]

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the manifest holds it."""
        value: dict[str, Any] = {"kind": self.kind, "check": self.check}
        if self.kind != "plain":
            value |= {"dtype": self.dtype, "shape": list(self.shape)}
        for key in ("format", "codebook", "transposed", "stack", "step"):  # each kind sets those that it has
            value |= {key: getattr(self, key)} if getattr(self, key) else {}
        return value if self.persistent else value | {"persistent": False}


@dataclass(frozen=True)
class Manifest:
    """A packed file's manifest.

    Attributes:
        tensors: by name, in the order of the source.
        aliases: names that stand for another tensor of the file.
        metadata: the source's own metadata, `format` = `pt` for instance.
        kernels: the checksums of the GPU kernels that the file carries, by name.
    """

    tensors: dict[str, Stored]
    aliases: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)

    def as_metadata(self) -> dict[str, str]:
        """Return the metadata of the packed file, the checksum still zeros."""
        value = {
            "version": VERSIONS[bool(self.kernels)],
            "tensors": {name: stored.as_json() for name, stored in self.tensors.items()},
            "aliases": self.aliases,
        }
        if self.kernels:
            value["kernels"] = self.kernels
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return {**self.metadata, CHECK_KEY: "0" * 8, KEY: text}


def is_packed(layout: Layout) -> bool:
    """Return True if a file claims to be packed by ggpass; its manifest may still be damaged."""
    return KEY in layout.metadata or CHECK_KEY in layout.metadata


def header_check(raw: bytes) -> tuple[int, int]:
    """Return the checksum that a header states and the one that it has.

    Raises:
        FormatError: it states none, or more than one.
    """
    stated = list(_CHECK_FIELD.finditer(raw))
    if len(stated) != 1:
        raise FormatError("the header of this packed file states no checksum; fetch the file again")
    at = stated[0].start(1)
    zeroed = np.frombuffer(raw[:at] + b"0" * 8 + raw[at + 8 :], np.uint8)
    return int(stated[0][1], 16), crc32c(zeroed)


def seal(raw: bytes) -> bytes:
    """Return the header with its checksum filled in."""
    at = _CHECK_FIELD.search(raw)
    if at is None:
        raise ValueError("a header without a place for its checksum")
    _, check = header_check(raw)
    return raw[: at.start(1)] + f"{check:08x}".encode() + raw[at.end(1) :]


def parse_manifest(layout: Layout) -> Manifest:
    """Return the manifest of a packed file, checked against the file's own layout.

    Raises:
        FormatError: damaged, of another version, or at odds with the tensors of the file.
    """
    if KEY not in layout.metadata:
        raise FormatError(
            "this file was not packed by ggpass, or its manifest is damaged; `ggpass pack` makes such files"
        )
    stated, found = header_check(layout.raw)
    if stated != found:
        raise FormatError(
            "the header is damaged or was rewritten by another tool (its checksum does not match); fetch the file again"
        )
    value = parse_json(layout.metadata[KEY], "the manifest")
    if not isinstance(value, dict) or type(value.get("version")) is not int:
        raise FormatError("the manifest names no version; fetch the file again")
    if value["version"] not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise FormatError(f"this file has version {value['version']} and this ggpass reads {known}; update ggpass")
    tensors, aliases = value.get("tensors"), value.get("aliases")
    if not isinstance(tensors, dict) or not isinstance(aliases, dict):
        raise FormatError("the manifest lists no tensors; fetch the file again")
    kernels = _parse_kernels(value.get("kernels", {}), tensors, layout)
    if {*tensors, *kernels} != set(layout.entries):
        odd = sorted({*tensors, *kernels} ^ set(layout.entries))[0]
        raise FormatError(f"the manifest and the file do not hold the same tensors: {odd!r:.80}; fetch the file again")
    for alias, target in aliases.items():
        if alias in tensors or not isinstance(target, str) or target not in tensors:
            raise FormatError(f"{alias!r:.80} stands for {target!r:.80}, which the file does not hold; fetch it again")
    parsed = {name: _parse_stored(name, entry, layout) for name, entry in tensors.items()}
    metadata = {key: text for key, text in layout.metadata.items() if key not in (KEY, CHECK_KEY)}
    return Manifest(parsed, dict(aliases), metadata, kernels)


def _parse_kernels(value: Any, tensors: dict[str, Any], layout: Layout) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(c) is int and 0 <= c < 1 << 32 for c in value.values()):
        raise FormatError("the manifest's kernels have no checksums; fetch the file again")
    for name in value:
        entry = layout.entries.get(name)
        if name in tensors or entry is None or entry.dtype != "U8" or len(entry.shape) != 1:
            raise FormatError(f"the kernel {name!r:.80} is not in the file as bytes; fetch the file again")
    return dict(value)


def _parse_stored(name: str, value: Any, layout: Layout) -> Stored:
    entry = layout.entries[name]
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise FormatError(f"{name} is stored in a way that this ggpass does not know; update ggpass")
    kind, check = value["kind"], value.get("check")
    if type(check) is not int or not 0 <= check < 1 << 32:
        raise FormatError(f"{name} has no checksum; fetch the file again")
    persistent = value.get("persistent", True)
    if not isinstance(persistent, bool):
        raise FormatError(f"{name} says {persistent!r:.40} and not whether it is persistent; fetch the file again")
    if kind == "plain":
        return Stored(kind, entry.dtype, entry.shape, check, persistent=persistent)
    dtype, shape = check_dtype_and_shape(value.get("dtype"), value.get("shape"), name)
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise FormatError(
            f"the payload of {name} is {entry.dtype} {list(entry.shape)}, not bytes; fetch the file again"
        )
    stored = Stored(kind, dtype, shape, check, persistent=persistent)
    if kind == "codes":
        return _parse_codes(name, value, stored)
    if kind == "grid":
        step = value.get("step")
        if not isinstance(step, float) or not 0 < step < float("inf") or np.float32(step) != step:
            raise FormatError(
                f"{name} has the grid step {step!r:.40}, which is no positive float32; fetch the file again"
            )
        return replace(stored, step=step)
    return stored


def _parse_codes(name: str, value: dict[str, Any], stored: Stored) -> Stored:
    fmt, stated = value.get("format"), value.get("codebook")
    if not isinstance(fmt, str) or fmt not in FORMATS:
        raise FormatError(
            f"{name} is in the format {fmt!r:.40}, and this ggpass knows {', '.join(FORMATS)}; update ggpass"
        )
    if stated != codebook_hash(FORMATS[fmt]):
        raise FormatError(f"{name} was packed with another codebook for {fmt} than this ggpass has; update ggpass")
    transposed = value.get("transposed", False)
    if not isinstance(transposed, bool) or len(stored.shape) < 1 or (transposed and len(stored.shape) != 2):
        raise FormatError(f"{name} of shape {list(stored.shape)} cannot be stored as these codes; fetch the file again")
    stack = value.get("stack", 0)
    if type(stack) is not int or (stack and (len(stored.shape) < 3 or stack < 1 or math.prod(stored.shape) % stack)):
        raise FormatError(f"{name} of shape {list(stored.shape)} has no {stack!r:.40} rows; fetch the file again")
    return replace(stored, format=fmt, codebook=codebook_hash(FORMATS[fmt]), transposed=transposed, stack=stack)
