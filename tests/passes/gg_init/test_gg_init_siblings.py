"""What a model's own initializer made smaller stays smaller: on real models, and on every law initializers follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ggpass
from ggpass.passes.gg_init.siblings import Sibling, kept_ratios, shortest

transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")


def gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=64, n_head=2, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


IDS = {"input_ids": torch.arange(1, 7).view(1, 6), "use_cache": False}


def std(weight: torch.Tensor) -> float:
    return weight.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kwargs", [IDS, None], ids=["graph", "module"])
def test_gpt2_keeps_its_residual_scaling(layers: int, kwargs: dict | None) -> None:
    """c_proj is 1/√(2·layers) of the rule, everything else the rule; in two layers that is also what √(1/4) gives.

    A ratio of two measured σ is known to 2 deviations of each, plus 5 % of rounding at most; 4 more for the drawing.
    """
    torch.manual_seed(layers)
    model = gpt2(layers)
    report = ggpass.init_(model, None, kwargs)
    ratio = (2 * layers) ** -0.5
    gelu = 2.155 if kwargs else 1.0
    for block in model.transformer.h:
        for weight, expected in (
            (block.attn.c_attn.weight, 64**-0.5),
            (block.attn.c_proj.weight, ratio * 64**-0.5),
            (block.mlp.c_fc.weight, math.sqrt(gelu / 64)),
            (block.mlp.c_proj.weight, ratio * 256**-0.5),
        ):
            assert std(weight) / expected == pytest.approx(1, abs=0.05 + 8 / math.sqrt(2 * 4096))
    kept = [change.name for change in report.changes if "of its siblings' σ" in change.what]
    assert len(kept) == 2 * layers
    assert all(name.endswith("c_proj.weight") for name in kept)
    assert std(model.transformer.wpe.weight) == pytest.approx(0.02, rel=0.15)


def test_a_second_call_changes_nothing() -> None:
    """The rule finds its own result: the same seed gives the same weights however often it is called.

    It reads σ off n weights, a Gaussian's to 1 / √(2n): here three times that for each of two readings.
    """
    torch.manual_seed(0)
    model = gpt2(2)
    ggpass.init_(model, None, IDS, shape=2.0)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ggpass.init_(model, None, IDS, shape=2.0)
    least = min(tensor.numel() for tensor in first.values() if tensor.dim() == 2)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first[name], rtol=min(0.05, 6 / math.sqrt(2 * least)), atol=0)


def test_t5_keeps_its_small_queries() -> None:
    """T5 has no 1/√d_kv in its attention: it is in the queries' first values, and a rule of fans would undo it."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=60, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4)
    model = transformers.T5Model(config)
    ids = IDS["input_ids"]
    report = ggpass.init_(model, None, {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False})
    kept = [change.name for change in report.changes if "of its siblings' σ" in change.what]
    assert len(kept) == 6
    assert all(name.endswith(".q.weight") for name in kept)
    for name, weight in model.named_parameters():
        if name.endswith(".q.weight"):
            assert std(weight) * 8 == pytest.approx(0.25, rel=0.15)


DEFAULTS = {
    "torch's own": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 3),
    "an MLP": lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in ((784, 512), (512, 512), (512, 512), (512, 10)))),
    "a CNN": lambda: nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in ((3, 16), (16, 64), (64, 64), (64, 256)))),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 64, 4), nn.Conv2d(64, 64, 4), nn.ConvTranspose2d(64, 3, 4, 2)),
    "BERT's": lambda: transformers.BertModel(
        transformers.BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    ),
}


@pytest.mark.parametrize("make", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_what_a_fan_explains_is_no_intention(make: object) -> None:
    """Initializers without a scaling of residual branches: nothing is kept, though σ differs from layer to layer."""
    torch.manual_seed(0)
    report = ggpass.init_(make())  # type: ignore[operator]
    assert report.changes
    assert not [change.name for change in report.changes if "of its siblings' σ" in change.what]


def initialized(law: str, shapes: list[tuple[int, int]]) -> list[Sibling]:
    """Siblings whose σ follows a law exactly, of (fan_in, fan_out) each."""
    formulas = {
        "constant": lambda i, o: 0.02,
        "torch": lambda i, o: (3 * i) ** -0.5,
        "lecun": lambda i, o: i**-0.5,
        "xavier": lambda i, o: (2 / (i + o)) ** 0.5,
        "he": lambda i, o: (2 / i) ** 0.5,
        "he, fan out": lambda i, o: (2 / o) ** 0.5,
        "odd": lambda i, o: 0.37 * i**-0.5,
    }
    return [Sibling(f"w{k}", formulas[law](i, o), i * o, i, o, i**-0.5) for k, (i, o) in enumerate(shapes)]


LAWS = ("constant", "torch", "lecun", "xavier", "he", "he, fan out", "odd")
BLOCK = [(256, 768), (256, 256), (256, 1024), (1024, 256)]


@settings(max_examples=30, deadline=None)
@given(law=st.sampled_from(LAWS), layers=st.integers(2, 6), ratio=st.floats(0.05, 0.45))
def test_any_law_and_any_ratio(law: str, layers: int, ratio: float) -> None:
    """The ends of the residual branches made smaller by one ratio: it is found, and nothing else is.

    From 0.45 up some ratios are what two laws give for these fans, and then either reading is right.
    """
    siblings = initialized(law, BLOCK * layers)
    ends = {f"w{k}" for k in range(4 * layers) if k % 4 in (1, 3)}
    scaled = [
        Sibling(w.name, w.std * (ratio if w.name in ends else 1), w.count, w.fan_in, w.fan_out, w.target)
        for w in siblings
    ]
    assert kept_ratios(siblings) == {}
    found = kept_ratios(scaled)
    assert found.keys() == ends
    assert all(value == pytest.approx(ratio, rel=0.05) for value in found.values())


def test_shortest_finds_what_was_written() -> None:
    """0.02 and 1 from what was measured; never off by more than 5 % or two deviations."""
    assert shortest(0.019873, 0.01) == 0.02
    assert shortest(1.0004, 0.001) == 1.0
    assert shortest(0.13, 0.25) == 0.13
    assert shortest(0.20412, 1e-3) == 0.204
    for value in torch.logspace(-6, 6, 200, dtype=torch.float64).tolist():
        for error in (1e-6, 1e-3, 1.0):
            assert abs(shortest(value, error) / value - 1) <= min(2 * error, 0.05)


def test_fewer_than_two_of_a_kind_have_no_siblings() -> None:
    assert kept_ratios([]) == {}
    assert kept_ratios(initialized("lecun", [(64, 64)])) == {}


def test_siblings_are_all_that_the_model_has() -> None:
    """`only=` the scaled ones: what they are smaller than is still seen."""
    torch.manual_seed(0)
    model = gpt2(3)
    report = ggpass.init_(model, only="*.c_proj.weight")
    assert len(report.changes) == 6
    assert all("of its siblings' σ" in change.what for change in report.changes)
