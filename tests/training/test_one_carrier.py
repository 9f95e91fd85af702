"""The coupled slope is in each step's gradient once, however a step's gradient comes about and the model is run."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.closeness import assert_within
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ggpass
from ggpass.ggd import smooth_bits
from ggpass.passes import BackSlash

STRENGTH, SHAPE, SCALE, EPSILON, RATE = 0.05, 0.8, 0.3, 0.02, 0.1
COUPLED = BackSlash(mode="coupled", strength=STRENGTH, shape=SHAPE, scale=SCALE, epsilon=EPSILON)
STEPS = 3


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A tied embedding, one weight used twice, and a break of Dynamo's graph or a checkpoint where asked."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.embed(ids))
        if self.kind == "broken":
            torch._dynamo.graph_break()
        y = checkpoint(self._block, x, use_reentrant=False) if self.kind == "checkpointed" else self._block(x)
        return self.head(y)

    def _block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


#: How a step's gradient comes about: backward through `run`, then a step of the optimizer.
Way = Callable[[Callable[[Tensor], Tensor], torch.optim.Optimizer, Tensor, torch.amp.GradScaler], None]


def plain(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    loss_of(run(ids)).backward()
    optimizer.step()


def micro_batches(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    for part in ids.chunk(2):
        (loss_of(run(part)) / 2).backward()
    optimizer.step()


def two_forwards(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    first, second = ids.chunk(2)
    (loss_of(run(first)) / 2 + loss_of(run(second)) / 2).backward()
    optimizer.step()


def backward_never_comes(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    run(ids[:3])
    plain(run, optimizer, ids, scaler)
    run(ids[:5])


def discarded(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    loss_of(run(ids[:3])).backward()
    optimizer.zero_grad()
    plain(run, optimizer, ids, scaler)


def zeroed_in_place(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    optimizer.zero_grad(set_to_none=False)
    micro_batches(run, optimizer, ids, scaler)


def scaled(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    for part in ids.chunk(2):
        scaler.scale(loss_of(run(part)) / 2).backward()
    scaler.step(optimizer)
    scaler.update()


def clipped(run: Any, optimizer: Any, ids: Tensor, scaler: Any) -> None:
    loss_of(run(ids)).backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
    optimizer.step()


CLIP = 0.05
WAYS = (plain, micro_batches, two_forwards, backward_never_comes, discarded, zeroed_in_place, scaled, clipped)


def reference(model: Net, batches: list[Tensor], clip: float | None) -> None:
    """θ ← θ − lr·(∂D/∂θ, clipped, + λ·∂R/∂θ) by hand: neither an optimizer nor the code under test."""
    weights = list(model.parameters())
    for ids in batches:
        gradients = torch.autograd.grad(loss_of(model(ids)), weights)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))  # as clip_grad_norm_ documents it
        matrices = [w for w in weights if w.dim() == 2]
        bits = sum((smooth_bits(w, SHAPE, SCALE, 1.0, EPSILON).sum() for w in matrices), torch.zeros(()))
        slopes = dict(zip(map(id, matrices), torch.autograd.grad(STRENGTH * bits, matrices)))
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                weight -= RATE * (factor * gradient + slopes.get(id(weight), 0.0))


def eager(model: Net, optimizer: Any) -> Any:
    COUPLED.attach(model, optimizer)
    return model


def prepared(model: Net, optimizer: Any) -> Any:
    train = ggpass.prepare(model, torch.zeros(8, dtype=torch.long), passes=COUPLED)
    train.attach(optimizer)
    return train


def compiled(model: Net, optimizer: Any) -> Any:
    COUPLED.attach(model, optimizer)
    return torch.compile(model, backend="aot_eager", dynamic=True)


def trained_by_the_backend(model: Net, optimizer: Any) -> Any:
    return torch.compile(model, backend="ggpass", dynamic=True, options={"train": COUPLED, "inner": "aot_eager"})


def backend_and_attached(model: Net, optimizer: Any) -> Any:
    COUPLED.attach(model, optimizer)
    return trained_by_the_backend(model, optimizer)


RUNS = (eager, prepared, compiled, trained_by_the_backend, backend_and_attached)


def equals_the_reference(start: Callable[[Net, Any], Any], way: Way, kind: str = "") -> None:
    model = Net(kind).double().train()
    twin = copy.deepcopy(model)
    twin.kind = ""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = start(model, optimizer)
    batches = [torch.randint(0, 10, (8,)) for _ in range(STEPS)]
    for ids in batches:
        optimizer.zero_grad()
        way(run, optimizer, ids, scaler)
    reference(twin, batches, CLIP if way is clipped else None)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        assert_within(mine, theirs.detach(), 1e-12, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", RUNS)
def test_three_steps_equal_those_by_hand(start: Callable[[Net, Any], Any], way: Way) -> None:
    equals_the_reference(start, way)


@pytest.mark.parametrize("way", [plain, micro_batches, two_forwards])
@pytest.mark.parametrize("start", [trained_by_the_backend, backend_and_attached])
def test_graph_breaks_do_not_show(start: Callable[[Net, Any], Any], way: Way) -> None:
    equals_the_reference(start, way, "broken")


@pytest.mark.parametrize("way", [plain, micro_batches])
@pytest.mark.parametrize("start", [eager, trained_by_the_backend])
def test_gradient_checkpointing_does_not_show(start: Callable[[Net, Any], Any], way: Way) -> None:
    equals_the_reference(start, way, "checkpointed")


def test_a_step_that_a_scaler_skips_holds_no_slope() -> None:
    model = Net().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    run, scaler = prepared(model, optimizer), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(run(torch.zeros(8, dtype=torch.long))) * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_reference_can_tell() -> None:
    """Without the rate, or with it in both of two micro-batches, the weights are far from it."""

    def twice(model: Net, optimizer: Any) -> Any:
        COUPLED.attach(model, optimizer)
        COUPLED.attach(model, optimizer)
        return model

    for start in (twice, lambda model, optimizer: model):
        with pytest.raises(AssertionError):
            equals_the_reference(start, micro_batches)


def test_a_caller_may_attach_after_the_backend_has() -> None:
    """The one that attached itself gives way."""
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run, ids = trained_by_the_backend(model, optimizer), torch.randint(0, 10, (8,))
    slopes = []
    for step in range(3):
        if step == 1:
            regularizer = BackSlash(
                mode="coupled", strength=2 * STRENGTH, shape=SHAPE, scale=SCALE, epsilon=EPSILON
            ).attach(model, optimizer)
            assert not regularizer.report.notes
        if step == 2:
            regularizer.detach()
        optimizer.zero_grad()
        loss_of(run(ids)).backward()
        task = model.inner.weight.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        slopes.append(model.inner.weight.grad - task)  # type: ignore[operator]
    # Differences of numbers below 8, which hold a slope each.
    assert_within(slopes[1], 2 * slopes[0], 8 * 2.0**-50)
    assert_within(slopes[2], slopes[0], 8 * 2.0**-50)
    assert regularizer.steps == 1


def test_a_new_optimizer_of_the_same_weights_is_found() -> None:
    """The one before is abandoned: its hooks hold it until the collector comes."""
    layer = nn.Linear(4, 4, bias=False).double()
    run = trained_by_the_backend(layer, None)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(
        STRENGTH * smooth_bits(layer.weight, SHAPE, SCALE, 1.0, EPSILON).sum(), layer.weight
    )
    kept = []
    for _ in range(3):
        kept.append(torch.optim.SGD(layer.parameters(), lr=0.0))
        for optimizer in (kept[-1], kept[0]):
            optimizer.zero_grad()
            run(torch.zeros(1, 4, dtype=torch.float64)).sum().backward()
            optimizer.step()
            assert_within(layer.weight.grad, expected, 1e-12)


def test_optimizers_of_parts_and_modules_of_one_class() -> None:
    """Each optimizer's steps reach its own weights; equal names of two modules do not meet."""
    layers = [nn.Linear(4, 4, bias=False).double() for _ in range(3)]
    runs = [trained_by_the_backend(layer, None) for layer in layers]  # type: ignore[arg-type]
    x = torch.zeros(1, 4, dtype=torch.float64)  # nothing but the slope
    both = torch.optim.SGD([layers[0].weight, layers[1].weight], lr=0.0)
    alone = torch.optim.SGD([layers[2].weight], lr=0.0)
    sum(run(x).sum() for run in runs).backward()
    both.step()
    assert [bool(layer.weight.grad.any()) for layer in layers] == [True, True, False]
    alone.step()
    for layer in layers:
        (expected,) = torch.autograd.grad(
            STRENGTH * smooth_bits(layer.weight, SHAPE, SCALE, 1.0, EPSILON).sum(), layer.weight
        )
        assert_within(layer.weight.grad, expected, 1e-12)


def test_keywords_that_are_needed_no_longer_are_taken_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from ggpass.training import prepared as module

    module._warn_once.cache_clear()
    for _ in range(2):
        model = Net()
        train = ggpass.prepare(model, torch.zeros(8, dtype=torch.long), passes=COUPLED)
        train.attach(torch.optim.SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu"), micro_batches=4)
    assert [record.message.count("no longer") for record in caplog.records] == [1]
