"""ggpass.prepare: training through edited graphs on the caller's own Parameters equals eager training with the term."""

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
from support.closeness import assert_within
from torch import Tensor, nn

import ggpass
from ggpass import InputError
from ggpass.ggd import smooth_bits
from ggpass.passes import BackSlash
from ggpass.training import Schedule
from ggpass.training.prepared import PreparedModel

U = 2.0**-53

#: The coupled form with fixed fits: λ = 0.05, ν = 0.8, α = 0.3, ε = 0.02.
COUPLED = BackSlash(mode="coupled", strength=0.05, shape=0.8, scale=0.3, epsilon=0.02)


class Net(nn.Module):
    """Tied embedding, batch norm, dropout, a frozen layer and a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(10, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.frozen, self.drop = nn.Linear(6, 6).requires_grad_(False), nn.Dropout(dropout)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("gain", torch.ones(6))

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.inner(self.embed(ids)) * self.gain)
        x = self.drop(torch.relu(x) + self.frozen(x))
        return {"logits": self.head(x if scale is None else x * scale)}


def batches(count: int, size: int = 8) -> list[Tensor]:
    """Ids, the last batch smaller."""
    return [torch.randint(0, 10, (size if i < count - 1 else 3,)) for i in range(count)]


def loss_of(out: Any) -> Tensor:
    return out["logits"].square().mean()


def term(model: nn.Module, strength: float = 0.05) -> Tensor:
    """λ·ΣR over the trainable matrices, tied ones once."""
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    return strength * sum((smooth_bits(w, 0.8, 0.3, 1.0, 0.02).sum() for w in weights), torch.zeros(()))


def same(ours: nn.Module, theirs: nn.Module, steps: int, largest: float = 16.0) -> None:
    """All tensors equal up to rounding: a few hundred roundings a step of float64 numbers below `largest`."""
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert_within(a, b.double(), steps * 1000 * U * largest, name)


def pair(dropout: float = 0.0, settings: BackSlash = COUPLED, **options: Any) -> tuple[Net, PreparedModel, Net]:
    """A model in float64, the same prepared, and a copy that trains by itself."""
    model = Net(dropout).double()
    twin = copy.deepcopy(model)
    return model, ggpass.prepare(model, torch.randint(0, 10, (8,)), passes=settings, **options), twin


def test_three_epochs_equal_eager_training_with_the_loss_term() -> None:
    model, prepared, twin = pair()
    before = {name: p.clone() for name, p in model.named_parameters()}
    mine = torch.optim.SGD(prepared.parameters(), lr=1e-2, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=1e-2, momentum=0.9)
    prepared.attach(mine)
    for _ in range(3):
        for ids in batches(3):
            mine.zero_grad()
            loss_of(prepared(ids)).backward()
            mine.step()
            theirs.zero_grad()
            (loss_of(twin(ids)) + term(twin)).backward()
            theirs.step()
    same(model, twin, 9)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_the_hook_without_a_graph_does_the_same_with_fits_schedule_and_tail() -> None:
    settings = BackSlash(
        mode="coupled", strength=0.05, refit_every=2, total_steps=8, schedule=Schedule(warm_up=2, tail=2)
    )
    model, prepared, twin = pair(settings=settings)
    mine = torch.optim.SGD(prepared.parameters(), lr=0.05)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05)
    regularizer, other = prepared.attach(mine), settings.attach(twin, theirs)
    for step in range(8):
        # The prepared model may be trained past its graph too: then the step adds the slope.
        forward = model if step in (3, 4) else prepared
        for run, optimizer in ((forward, mine), (twin, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss_of(run(torch.randint(0, 10, (8,)))).backward()
            optimizer.step()
    same(model, twin, 8)
    assert regularizer.steps == other.steps == 8
    assert prepared.bits() == pytest.approx(other.bits())
    assert "bits/weight" in prepared.status()


def test_parameters_and_state_are_the_models_own() -> None:
    model, prepared, twin = pair()
    assert [(n, id(p)) for n, p in prepared.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in prepared.named_buffers()] == [(n, id(b)) for n, b in model.named_buffers()]
    assert list(prepared.state_dict()) == list(model.state_dict())
    assert [n for n, _ in prepared.named_modules()] == [n for n, _ in model.named_modules()]
    assert inspect.signature(prepared.forward) == inspect.signature(model.forward)
    other = Net().double()
    assert prepared.load_state_dict(other.state_dict()).missing_keys == []
    same(model, other, 0)
    outer = nn.ModuleDict({"net": prepared})
    outer.load_state_dict({f"net.{name}": value for name, value in twin.state_dict().items()})
    assert list(outer.state_dict()) == [f"net.{name}" for name in model.state_dict()]
    same(model, twin, 0)


def test_train_and_eval_switch_graphs_and_share_running_statistics() -> None:
    model, prepared, _ = pair(dropout=0.5)
    ids = batches(2)[0]
    assert prepared.training
    first = prepared(ids)["logits"]
    assert not torch.equal(first, prepared(ids)["logits"]), "dropout is active in training"
    assert model.norm.num_batches_tracked == 2
    prepared.eval()
    assert not model.norm.training
    assert torch.equal(prepared(ids)["logits"], prepared(ids)["logits"])
    assert torch.equal(prepared(ids)["logits"], model(ids)["logits"])
    assert model.norm.num_batches_tracked == 2
    prepared.train()
    prepared(ids)
    assert model.norm.num_batches_tracked == 3


def test_flags_of_single_modules_are_kept() -> None:
    model = Net().double()
    model.norm.eval()
    prepared = ggpass.prepare(model, torch.randint(0, 10, (8,)), passes=COUPLED)
    assert [m.training for m in model.modules()].count(False) == 1
    prepared(batches(2)[0])
    assert model.norm.num_batches_tracked == 0
    model.norm.train()
    prepared(batches(2)[0])
    assert model.norm.num_batches_tracked == 1


def test_a_loss_over_two_forwards_holds_the_slope_once() -> None:
    model, prepared, twin = pair()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    prepared.attach(optimizer)
    first, second = batches(3)[:2]
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        (loss_of(prepared(first)) + loss_of(prepared(second))).backward()
        optimizer.step()
        (loss_of(twin(first)) + loss_of(twin(second)) + term(twin)).backward()
        for a, b in zip(model.parameters(), twin.parameters()):
            if b.grad is not None:
                assert_within(a.grad if a.grad is not None else torch.zeros(0), b.grad, 1e4 * U)


@pytest.mark.parametrize("how", ["micro_batches", "scaler", "both"])
def test_accumulated_and_scaled_gradients_hold_the_whole_slope_once(how: str) -> None:
    model, prepared, twin = pair()
    model.norm.eval()  # batch statistics of halves are not those of the whole
    twin.norm.eval()
    mine, theirs = torch.optim.SGD(prepared.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1) if how != "micro_batches" else None
    parts = 1 if how == "scaler" else 2
    prepared.attach(mine)
    for step in range(4):
        ids = torch.randint(0, 10, (8,))
        mine.zero_grad()
        for part in ids.chunk(parts):
            loss = loss_of(prepared(part)) / parts
            # A loss that overflows: the step is skipped, and the scale halves.
            loss = loss * math.inf if step == 1 and scaler is not None else loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            mine.step()
        else:
            scaler.step(mine)
            scaler.update()
        if step != 1 or scaler is None:
            theirs.zero_grad()
            (loss_of(twin(ids)) + term(twin)).backward()
            theirs.step()
    # The scaler's inverse is taken in float32.
    same(model, twin, 4, largest=16.0 if scaler is None else 2.0**30)
    assert scaler is None or scaler.get_scale() == 4096.0, "doubled three times, halved once"


def test_autocast_trains_through_the_graph() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8)
    prepared = ggpass.prepare(model, x, passes=COUPLED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prepared.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = prepared(x), twin(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    mine.sum().backward()
    optimizer.step()
    (theirs.sum() + term(twin)).backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        assert_within(a.grad, b.grad.double(), 64 * 2.0**-24 * (1 + b.grad.double().abs()))


def test_other_inputs_are_traced_when_they_come_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared, _ = pair()
    ids, scale = batches(2)[0], torch.full((8, 1), 2.0, dtype=torch.float64)
    parts = len(prepared.report.parts)
    prepared(ids)
    prepared(ids[:3])
    assert len(prepared.report.parts) == parts
    prepared.eval()
    assert torch.equal(prepared(ids, scale=scale)["logits"], model(ids, scale=scale)["logits"])
    assert torch.equal(prepared(scale=scale[:5], ids=ids[:5])["logits"], model(ids[:5], scale=scale[:5])["logits"])
    assert len(prepared.report.parts) == parts + 2
    monkeypatch.setattr("ggpass.training.prepared.MOST_TRACES", 4)
    with pytest.raises(InputError, match=r"4 different inputs.*dynamic_shapes="):
        prepared(ids, scale=scale.float())


class Fixed(nn.Module):
    """Code that holds the batch to the size of the example, and a branch on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight if x.shape[0] == 8 else x * self.weight[: x.shape[0]] * 10
        return y.sum(-1)


def test_a_batch_that_the_trace_fixes_is_reported_and_another_one_is_still_right() -> None:
    model = Fixed()
    prepared = ggpass.prepare(model, torch.randn(8, 4), passes=COUPLED)
    assert any("fixed for x: 8" in note for part in prepared.report.parts for note in part.notes)
    for size in (8, 3, 1, 8):
        x = torch.randn(size, 4)
        assert torch.equal(prepared(x), model(x))


def test_dynamic_shapes_are_taken_as_given() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    shapes = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", max=32)},)
    prepared = ggpass.prepare(model, torch.randn(4, 6, 4), passes=COUPLED, dynamic_shapes=shapes)
    parts = len(prepared.report.parts)
    x = torch.randn(2, 9, 4)
    assert torch.equal(prepared(x), model(x))
    assert len(prepared.report.parts) == parts


def test_changes_of_dtype_and_of_parameters_are_followed() -> None:
    model, prepared, twin = pair()
    ids = batches(2)[0]
    prepared.float()
    assert prepared(ids)["logits"].dtype == torch.float32
    prepared.double()
    prepared.load_state_dict({k: v.clone() for k, v in twin.state_dict().items()}, assign=True)
    for tensor in model.parameters():
        tensor.requires_grad_(True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    prepared.attach(optimizer)
    loss_of(prepared(ids)).backward()
    optimizer.step()
    (loss_of(twin(ids)) + term(twin)).backward()
    assert twin.inner.weight.grad is not None
    assert model.inner.weight.grad is not None
    assert_within(model.inner.weight.grad, twin.inner.weight.grad, 1e4 * U)


def test_a_deep_copy_trains_apart_and_pickling_is_refused() -> None:
    model, prepared, _ = pair()
    twin = copy.deepcopy(prepared)
    assert twin.inner.weight is not model.inner.weight
    assert torch.equal(twin(batches(2)[0])["logits"].detach() * 0, torch.zeros(8, 10))
    with torch.no_grad():
        twin.inner.weight.zero_()
    assert model.inner.weight.abs().sum() > 0
    with pytest.raises(InputError, match="state_dict"):
        torch.save(prepared, io.BytesIO())


def test_training_says_which_graphs_run_whoever_switched() -> None:
    """What evaluates in between, and goes back to the mode it found, goes back to training."""
    model = Net(dropout=0.5).eval()  # as from_pretrained leaves a model
    prepared = ggpass.prepare(model, torch.randint(0, 10, (8,)))
    assert not prepared.training
    prepared.train()
    before = prepared.training
    prepared.eval()
    assert (before, prepared.training) == (True, False)
    prepared.train(before)
    assert model.training
    model.eval()
    assert not prepared.training
    prepared.training = True
    assert model.training
    assert not nn.Sequential(prepared).eval()[0].training


def test_deployment_takes_the_model_itself() -> None:
    model, prepared, _ = pair(dropout=0.5)
    lowered = ggpass.compile(prepared, target="rf8-reference")
    assert type(lowered) is Net
    artifact = ggpass.compile(prepared, torch.randint(0, 10, (8,)), target="rf8-reference")
    assert not any("rate_node" in str(node.target) for node in artifact.program.graph.nodes)
    assert prepared.training
    assert model.training


def test_without_inputs_the_module_trains_as_it_is() -> None:
    model = Net()
    prepared = ggpass.prepare(model)
    assert any("no graph" in note for note in ggpass.report(prepared).notes)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.5)
    with pytest.raises(InputError, match="attach"):
        prepared.bits()
    regularizer = prepared.attach(optimizer)
    loss_of(prepared(batches(2)[0])).backward()
    optimizer.step()
    assert regularizer.steps == 1
    with pytest.raises(InputError, match="detach"):
        prepared.attach(optimizer)


def test_what_cannot_be_prepared_is_refused_with_the_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Net()
    with pytest.raises(InputError, match="takes a torch"):
        ggpass.prepare(print)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prepared already"):
        ggpass.prepare(ggpass.prepare(model))
    with pytest.raises(InputError, match="codes do not train"):
        ggpass.prepare(ggpass.compile(model, target="rf8-reference"))
    with pytest.raises(InputError, match="needs a graph"):
        ggpass.prepare(model, dynamic_shapes=())
    with pytest.raises(InputError, match="kwargs="):
        ggpass.prepare(model, {"ids": torch.zeros(3)})  # type: ignore[arg-type]
    with pytest.raises(ggpass.TraceError, match=r"Branch.*(\n.*)*attach"):
        ggpass.prepare(Branch(), torch.randn(3), passes=())
    with pytest.raises(InputError, match="acts beside"):
        ggpass.prepare(model, passes=()).attach(torch.optim.SGD(model.parameters()))


def test_a_transformer_with_its_own_loss_trains_as_eagerly_with_the_term() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=40, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    model = transformers.BertForSequenceClassification(config).double().train()
    twin = copy.deepcopy(model)

    def batch(size: int) -> dict[str, Tensor]:
        mask = torch.ones(size, 7, dtype=torch.long)
        mask[1:, 5:] = 0
        ids = torch.randint(0, 40, (size, 7))
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (size,))}

    prepared = ggpass.prepare(model, kwargs=batch(4), passes=COUPLED)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin))
    prepared.attach(mine)
    for size in (4, 4, 3):
        inputs = batch(size)
        out = prepared(**inputs)
        assert type(out) is type(twin(**inputs))
        for loss, optimizer in ((out.loss, mine), (twin(**inputs).loss + term(twin), theirs)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert prepared.config is config
    same(model, twin, 3)
    prepared.eval()
    inputs.pop("labels")
    with torch.no_grad():
        assert_within(prepared(**inputs).logits, twin(**inputs).logits, 1e4 * U)
