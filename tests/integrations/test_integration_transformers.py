"""BackSlash in the Hugging Face Trainer: real trainings of a tiny BERT on the CPU."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ggpass.errors import InputError
from ggpass.integrations.transformers import BackSlashCallback
from ggpass.passes.backslash import BackSlash
from ggpass.training import RateSettings, Schedule

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=8,
)
STEPS = 10
TARGET = {"target_bits": 1.5, "refit_every": 3, "schedule": Schedule(warm_up=0.2, tail=0.3)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As many threads in the unbroken run, which a fixture of the module makes, as in those that resume."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, 30, (6,), generator=generator),
            "labels": torch.randint(0, 2, (), generator=generator),
        }
        for _ in range(48)
    ]


def trainer(folder: Path, *callbacks: TrainerCallback, seed: int = 0, **arguments: Any) -> Trainer:
    torch.manual_seed(seed)
    settings = {"max_steps": STEPS, "save_steps": 5, "logging_steps": 1, "per_device_train_batch_size": 4, **arguments}
    return Trainer(
        BertForSequenceClassification(CONFIG),
        TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=1, **settings
        ),
        train_dataset=data(),
        callbacks=list(callbacks),
    )


def weights(of: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in of.model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, BackSlashCallback]:
    folder = tmp_path_factory.mktemp("unbroken")
    callback = BackSlashCallback(**TARGET)
    run = trainer(folder, callback)
    run.train()
    return folder, run, callback


class Gradients(TrainerCallback):
    """Keeps the gradients that each real step of the optimizer is about to read."""

    def __init__(self) -> None:
        self.of_steps: list[list[Tensor | None]] = []
        self.batches = 0

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.of_steps.append(gradients)
        self.batches += 1

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_accumulated_batches_are_one_step_each_and_the_steps_are_those_of_a_plain_loop(
    tmp_path: Path, mode: str
) -> None:
    settings = BackSlash(strength=1e-3, refit_every=2, mode=mode)  # type: ignore[arg-type]
    callback, seen = BackSlashCallback(settings), Gradients()
    arguments = {"gradient_accumulation_steps": 2, "optim": "sgd", "lr_scheduler_type": "constant"}
    run = trainer(tmp_path, callback, seen, save_strategy="no", max_steps=4, **arguments)
    model = copy.deepcopy(run.model)
    run.train()
    assert seen.batches == 8
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regularizer = settings.attach(model, optimizer)
    for gradients in seen.of_steps:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert callback.regularizer is not None
    assert callback.regularizer.steps == regularizer.steps == 4
    assert same(weights(run), [parameter.detach() for parameter in model.parameters()])


def test_resumed_from_a_moved_checkpoint_it_ends_with_the_same_bits(
    unbroken: tuple[Path, Trainer, BackSlashCallback], tmp_path: Path
) -> None:
    folder, run, callback = unbroken
    moved = tmp_path / "elsewhere"
    os.symlink(folder / "checkpoint-5", moved)
    again = BackSlashCallback(BackSlash(total_steps=STEPS, **TARGET))
    resumed = trainer(tmp_path / "out", again, seed=7)
    resumed.train(resume_from_checkpoint=str(moved))
    assert same(weights(run), weights(resumed))
    assert callback.regularizer is not None
    assert again.regularizer is not None
    state, expected = again.regularizer.state_dict(), callback.regularizer.state_dict()
    assert torch.equal(state.pop("fits"), expected.pop("fits"))
    assert state == expected


def test_on_the_grid_the_exact_weights_are_in_a_file_beside(tmp_path: Path) -> None:
    settings = {"strength": 1e-3, "refit_every": 3, "spread": 0.5, "schedule": Schedule(on_grid=0.8)}
    run = trainer(tmp_path / "out", BackSlashCallback(**settings))
    run.train()
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, BackSlashCallback))
    assert callback.regularizer is not None
    step = callback.regularizer.grid_steps["bert.embeddings.word_embeddings.weight"]
    on_grid = run.model.bert.embeddings.word_embeddings.weight.double() / step
    torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-4)  # of symbols up to 100, in float32
    moved = tmp_path / "moved"
    (tmp_path / "out/checkpoint-5").rename(moved)
    with pytest.raises(InputError, match="name its folder"):
        trainer(tmp_path / "out", BackSlashCallback(**settings)).train(resume_from_checkpoint=str(moved))
    # Of another training in the same place, which must not be taken for it.
    trainer(tmp_path / "out", BackSlashCallback(**settings), seed=5, max_steps=5).train()
    with pytest.raises(InputError, match="name its folder"):
        trainer(tmp_path / "out", BackSlashCallback(**settings)).train(resume_from_checkpoint=str(moved))
    resumed = trainer(tmp_path / "out", BackSlashCallback(**settings), seed=7, resume_from_checkpoint=str(moved))
    resumed.train(resume_from_checkpoint=str(moved))
    assert same(weights(run), weights(resumed))


def test_without_its_state_a_resumed_training_ends_elsewhere(
    unbroken: tuple[Path, Trainer, BackSlashCallback], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The state matters, or the test above could not fail; and a loss of it is said."""
    folder, run, _ = unbroken
    stripped = tmp_path / "checkpoint"
    stripped.mkdir()
    for path in (folder / "checkpoint-5").iterdir():
        (stripped / path.name).write_bytes(path.read_bytes())
    state = json.loads((stripped / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["BackSlashCallback"]
    (stripped / "trainer_state.json").write_text(json.dumps(state))
    callback = BackSlashCallback(**TARGET)
    resumed = trainer(tmp_path / "out", callback)
    resumed.train(resume_from_checkpoint=str(stripped))
    assert not same(weights(run), weights(resumed))
    assert "holds no state of BackSlashCallback" in caplog.text
    assert callback.regularizer is not None
    assert callback.regularizer.steps == callback.regularizer.settings.total_steps == 5
    assert "saved" in (tmp_path / "out/checkpoint-10/trainer_state.json").read_text()


def test_a_trainer_that_rebuilds_its_callbacks_from_the_checkpoint_continues_too(
    unbroken: tuple[Path, Trainer, BackSlashCallback], tmp_path: Path
) -> None:
    folder, run, _ = unbroken
    resumed = trainer(tmp_path, BackSlashCallback(strength=1.0), seed=3, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert same(weights(run), weights(resumed))


def test_steps_come_from_the_trainer_and_zeros_stay_in_its_tail(
    unbroken: tuple[Path, Trainer, BackSlashCallback],
) -> None:
    callback = unbroken[2]
    assert callback.regularizer is not None
    assert callback.regularizer.settings.total_steps == STEPS
    assert callback.regularizer.steps == STEPS
    zeros = sum(int((weight == 0).sum()) for weight in callback.regularizer.weights)
    padding = CONFIG.hidden_size  # the row of the padding token is zero from the start
    assert zeros > 2 * padding
    assert not callback.regularizer.settings.schedule.factor(STEPS - 3, STEPS)


def test_bits_join_every_log_of_the_training_but_no_other(unbroken: tuple[Path, Trainer, BackSlashCallback]) -> None:
    _, run, callback = unbroken
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    for entry in logged:
        assert 0 < entry["bits_per_weight"] < 8
        assert 0 <= entry["zeros"] <= 1
        assert entry["rate_strength"] >= 0
    assert "bits_per_weight" not in run.state.log_history[-1]
    assert callback.regularizer is not None
    state = callback.regularizer.state_dict()
    assert logged[-1]["bits_per_weight"] == state["measured_bits"]
    assert logged[-1]["zeros"] == state["measured_zeros"]
    assert logged[-1]["rate_strength"] == state["strength"]


class OnLog(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_a_callback_behind_it_sees_the_bits(tmp_path: Path) -> None:
    after = OnLog()
    trainer(tmp_path, BackSlashCallback(strength=1e-3), after, max_steps=1, save_strategy="no").train()
    assert "bits_per_weight" in after.seen[0]


def test_after_the_training_the_optimizer_is_free_again(unbroken: tuple[Path, Trainer, BackSlashCallback]) -> None:
    _, run, callback = unbroken
    assert callback.regularizer is not None
    assert not run.optimizer.optimizer._optimizer_step_post_hooks
    assert callback.regularizer.bits() > 0


def begin(callback: BackSlashCallback, model: nn.Module, optimizer: Any) -> None:
    state = TrainerState(max_steps=STEPS)
    arguments: Any = SimpleNamespace(gradient_accumulation_steps=1)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model, optimizer=optimizer)


def test_a_step_that_amp_skipped_is_none() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    model = nn.Linear(4, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    callback = BackSlashCallback(strength=1e-3)
    begin(callback, model, wrapped)
    assert callback.regularizer is not None
    for loss_is_finite, steps in ((True, 1), (False, 1), (True, 2)):
        before = model.weight.detach().clone()
        loss = model(torch.ones(3, 4)).square().mean() * (1.0 if loss_is_finite else float("inf"))
        scaler.scale(loss).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert callback.regularizer.steps == steps
        assert torch.equal(before, model.weight) != loss_is_finite


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    callback = BackSlashCallback(strength=1e-3)
    run = trainer(tmp_path, callback, max_steps=2, save_strategy="no")
    run.train()
    first = callback.regularizer
    run.train()
    assert callback.regularizer is not first
    assert callback.regularizer is not None
    assert callback.regularizer.steps == 2


def test_what_cannot_be_meant_is_refused_before_any_training() -> None:
    for settings, fields in ((None, {}), (BackSlash(strength=1.0), {"strength": 1.0})):
        with pytest.raises(InputError, match="either a BackSlash or its fields"):
            BackSlashCallback(settings, **fields)
    with pytest.raises(InputError, match="not dict"):
        BackSlashCallback({"strength": 1.0})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exactly one"):
        BackSlashCallback(strength=1.0, target_bits=2.0)
    BackSlashCallback(RateSettings(strength=1.0))


def test_an_optimizer_that_is_not_torchs_is_refused() -> None:
    class Flat:
        param_groups: tuple[()] = ()

    with pytest.raises(InputError, match="Flat is not a torch optimizer"):
        begin(BackSlashCallback(strength=1.0), nn.Linear(3, 3), Flat())


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, BackSlashCallback(strength=1.0), BackSlashCallback(strength=2.0), max_steps=1)
    with pytest.raises(InputError, match="give the Trainer one"):
        run.train()
