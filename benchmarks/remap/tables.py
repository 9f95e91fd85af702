"""deepshape.md and deepshape.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

Row = dict[str, Any]

TITLES = {"mlp": "MLP", "cnn": "CNN", "byte-lm": "byte LM", "minilm-classifier": "MiniLM classifier"}

COLORS = ("#5a5a5a", "#b5371f", "#d98c1f", "#1f6b3a", "#3b6fb0", "#7a4fa3", "#9a9a1f")


def write(found: dict[str, list[Row]], folder: Path, seed: int) -> None:
    """Write the tables of what was measured, and the plot of the trained tasks; show the tables."""
    text = embeddings_table(found["embeddings"]) if "embeddings" in found else ""
    tasks = {name: rows for name, rows in found.items() if name != "embeddings"}
    if tasks:
        text += "\n" * bool(text) + trained_table(tasks, seed)
        plot(tasks, folder / "deepshape.png", seed)
    (folder / "deepshape.md").write_text(text, encoding="utf-8")
    Console().print(text, markup=False, soft_wrap=True)


def embeddings_table(rows: list[Row]) -> str:
    """all-MiniLM-L6-v2 without fine-tuning."""
    lines = [
        "### all-MiniLM-L6-v2, 400 sentences, no fine-tuning",
        "",
        "Entropy of each matrix by itself, mean over the weights; cosine to the float model's embeddings, mean.",
        "",
        "| remap | ν | bits at 2^-13 | cosine | bits at each one's σ/8 | cosine there |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = row["shape"][1]
        lines.append(
            f"| {row['way']} | {shape:.2f} | {row['bits']:.2f} | {row['cosine']:.4f} | {row['coarse_bits']:.2f} | "
            f"{row['coarse_cosine']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def trained_table(tasks: dict[str, list[Row]], seed: int) -> str:
    """The trained examples."""
    lines = [
        f"### Trained examples, AdamW, seed {seed}; fine-tuned: a fifth of the epochs, a tenth of the learning rate",
        "",
        "Bits: zero-order entropy over all matrices on the model's own grid, the coarsest of `grid_points.STEPS` (by "
        "bisection) whose held-out score is within the task's tolerance of the same model's in float. Score: on the "
        "test set, on that grid (accuracy in %; NLL in nats for the LM). Last column: bits of the fine-tuned model on "
        "the coarsest grid that holds the held-out score of AdamW's float model, within the same tolerance.",
        "",
        "| task | remap | ν before → after | bits before | after | fine-tuned | score before | after | fine-tuned | "
        "bits at AdamW's quality |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in tasks.items():
        for row in rows:
            states = [row.get(state) for state in ("before", "after", "tuned")]
            bits = " | ".join("" if s is None else f"{s['bits']:.2f}" for s in states)
            scores = " | ".join("" if s is None else score_in_words(name, s["grid_test"]) for s in states)
            equal = row["tuned"]["equal_bits"]
            after = row["shape"][1] if "after" in row else row["tuned_shape"]
            lines.append(
                f"| {TITLES[name]} | {row['way']} | {row['shape'][0]:.2f} → {after:.2f} | {bits} | {scores} | "
                f"{'none' if equal is None else f'{equal:.2f}'} |"
            )
    return "\n".join(lines) + "\n"


def score_in_words(task: str, score: float) -> str:
    """Accuracy in %, or NLL in nats."""
    return f"{-score:.3f}" if task == "byte-lm" else f"{100 * score:.2f}"


def plot(tasks: dict[str, list[Row]], path: Path, seed: int) -> None:
    """For each task a panel: before, after (hollow) and fine-tuned (filled), each on its own grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(tasks))
    height = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(6 * columns, 4.2 * height), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, (name, rows) in zip(axes.flat, tasks.items()):
        scale = 1 if name == "byte-lm" else 100
        for row, color in zip(rows, COLORS):
            states = [row[state] for state in ("before", "after", "tuned") if state in row]
            x, y = [s["bits"] for s in states], [scale * s["grid_test"] for s in states]
            panel.plot(x, y, "-", color=color, linewidth=1)
            panel.plot(x[1:-1], y[1:-1], "o", color=color, fillstyle="none", markersize=6)
            panel.plot(x[-1], y[-1], "o", color=color, markersize=7, label=row["way"])
        start = rows[0]["before"]
        panel.plot(start["bits"], scale * start["grid_test"], "*", color="black", markersize=13, label="before")
        # What lies within a point (or 4 % NLL) is mostly noise of one seed: it shall not fill the panel.
        low, high = panel.get_ylim()
        least, middle = (0.04 * abs(low) if name == "byte-lm" else 1.0), (low + high) / 2
        if high - low < least:
            panel.set_ylim(middle - least / 2, middle + least / 2)
        panel.set_title(TITLES[name])
        panel.set_xlabel("bits a weight, on the model's own grid")
        panel.set_ylabel("−NLL, test (nats a byte)" if name == "byte-lm" else "test accuracy (%)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(f"DeepShape: after the remap (hollow) and after fine-tuning (filled), seed {seed}", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
