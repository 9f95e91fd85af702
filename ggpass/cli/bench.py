"""`ggpass bench`: the lowered model beside the float one, timed in turns, and how close their outputs are."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ggpass import api
from ggpass.cli.console import echo_json, many, progress, say, stderr, stdout
from ggpass.cli.models import load_model, place_for, token_inputs
from ggpass.cli.options import Dtype, Json, ModelDir, Only, Skip, TargetName
from ggpass.graph.tables import Column, size, table
from ggpass.targets import resolve


@dataclass(frozen=True)
class Timing:
    """One input size, both models.

    Attributes:
        float_ms, lowered_ms: medians over the rounds.
        ratio: the median over the rounds of float time / lowered time; above 1 the lowered model is faster.
        cosine_mean, cosine_min: between the two models' outputs, over the vectors of their last dimension.
    """

    batch: int
    sequence: int
    float_ms: float
    lowered_ms: float
    ratio: float
    cosine_mean: float
    cosine_min: float


def bench_command(
    model_dir: ModelDir,
    target: TargetName = "rf8-cpu",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="BATCHxSEQUENCE of the input; may be repeated. Left out: 1x16, 1x128, 8x64.", metavar="BxS"),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Timed calls of each model and size.", min=1)] = 20,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads for both models; left out: torch's.", min=1)
    ] = None,
    dtype: Dtype = "float32",
    only: Only = None,
    skip: Skip = None,
    json: Json = False,
) -> None:
    """Time a model against its lowered self, in turns, on random tokens.

    Every round calls both models, so that whatever else the machine does meets both; times are medians and the ratio
    is the median of the rounds' ratios. The cosine compares the outputs: last hidden states, or logits.
    """
    sizes = [parse_shape(text) for text in shape or ("1x16", "1x128", "8x64")]
    resolve(target)
    if threads is not None:
        torch.set_num_threads(threads)
    model, notes = load_model(model_dir, dtype)
    model.to(place_for(target))
    inputs = [token_inputs(model, batch, sequence, "bench", "time it with ggpass.compile") for batch, sequence in sizes]
    with stderr().status(f"compiling for {target}"):
        lowered = api.compile(model, target=target, only=only or (), skip=skip or ())
    # A call on a GPU returns before it is done.
    finish = torch.cuda.synchronize if place_for(target) == "cuda" else lambda: None
    results = []
    with progress() as bar:
        task = bar.add_task("timing", total=rounds * len(sizes))
        for (batch, sequence), kwargs in zip(sizes, inputs):
            bar.update(task, description=f"timing {batch}x{sequence}")
            results.append(compare(model, lowered, kwargs, rounds, batch, sequence, lambda: bar.advance(task), finish))
    bytes_of = api.sizes(lowered)
    if json:
        echo_json(
            {
                "model": str(model_dir),
                "target": target,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "bytes": asdict(bytes_of),
                "timings": [asdict(result) for result in results],
            }
        )
        return
    titles = ("input", "float ms", f"{target} ms", "speed", "cosine, mean", "least")
    rows = [
        [
            f"{r.batch}x{r.sequence}",
            *(f"{r.float_ms:.2f}", f"{r.lowered_ms:.2f}", f"{r.ratio:.2f}x"),
            *(f"{r.cosine_mean:.5f}", f"{r.cosine_min:.5f}"),
        ]
        for r in results
    ]
    console = stdout()
    console.print(table([Column(title) for title in titles], rows, console.width))
    say(
        *notes,
        f"{type(model).__name__} in {next(model.parameters()).dtype}: {size(bytes_of.before)} → {size(bytes_of.after)} "
        f"({bytes_of.ratio:.1%}); {many(torch.get_num_threads(), 'thread')}, medians of {many(rounds, 'round')}",
    )


def parse_shape(text: str) -> tuple[int, int]:
    """(batch, sequence) of `BxS`.

    Raises:
        typer.BadParameter: not two positive integers.
    """
    batch, _, sequence = text.partition("x")
    if not (batch.isdigit() and sequence.isdigit() and int(batch) and int(sequence)):
        raise typer.BadParameter(f"a shape is BATCHxSEQUENCE, as in 8x64, not {text!r}")
    return int(batch), int(sequence)


def first_tensor(output: Any) -> Tensor:
    """Return the logits or hidden states of a model's output, its first tensor, as (vectors, width)."""
    tensor = output[0] if not hasattr(output, "dim") else output
    return tensor.detach().float().flatten(0, -2)


def compare(
    model: nn.Module,
    lowered: nn.Module,
    kwargs: dict[str, Any],
    rounds: int,
    batch: int,
    sequence: int,
    step: Callable[[], None] = lambda: None,
    finish: Callable[[], None] = lambda: None,
) -> Timing:
    """Times of both models on one input, taken in turns after two untimed calls of each.

    Args:
        finish: waits for what a call left running.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(2):
            outputs = [first_tensor(each(**kwargs)) for each in (model, lowered)]
        finish()
        for turn in range(rounds):
            pair = ((0, model), (1, lowered))
            for place, each in pair if turn % 2 else reversed(pair):
                start = time.perf_counter()
                each(**kwargs)
                finish()
                times[place].append((time.perf_counter() - start) * 1e3)
            step()
        cosines = torch.nn.functional.cosine_similarity(outputs[0].double(), outputs[1].double(), dim=-1)
    ratios = [a / b for a, b in zip(*times)]
    float_ms, lowered_ms, ratio = map(median, (*times, ratios))
    return Timing(batch, sequence, float_ms, lowered_ms, ratio, cosines.mean().item(), cosines.min().item())
