"""BackSlash in Lightning: real fits of a tiny network on the CPU."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

from ggpass.errors import InputError
from ggpass.integrations.lightning import BackSlashCallback
from ggpass.passes.backslash import BackSlash
from ggpass.training import Schedule

STEPS = 10
BATCHES = 5
LEARNING_RATE = 0.05
TARGET = {"target_bits": 2.0, "refit_every": 3, "schedule": Schedule(warm_up=0.2, tail=0.3)}

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As many threads in the unbroken run, which a fixture of the module makes, as in those that resume."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Module(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        # By the step, since Lightning's own place in the data is another after a checkpoint.
        return self.loss(batches()[self.trainer.global_step % BATCHES])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(BATCHES)
    ]


def fit(module: Module, *callbacks: pl.Callback, checkpoint: Path | None = None, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{"max_steps": STEPS, "max_epochs": -1, **arguments},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def plain_loop(settings: BackSlash, micro_batches: int) -> Module:
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=0.9)
    regularizer = settings.attach(module, optimizer)
    for step in range(STEPS):
        for _ in range(micro_batches):
            (module.loss(batches()[step % BATCHES]) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert regularizer.steps == STEPS
    return module


@pytest.mark.parametrize("accumulated", [1, 5])
@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_it_trains_as_a_plain_loop_does(mode: str, accumulated: int) -> None:
    """Lightning makes gradients inside step(closure), which the coupled mode has to reach."""
    settings = BackSlash(strength=3e-3, refit_every=2, mode=mode)  # type: ignore[arg-type]
    module, callback = Module(), BackSlashCallback(settings)
    fit(module, callback, accumulate_grad_batches=accumulated)
    assert callback.regularizer is not None
    assert callback.regularizer.steps == STEPS
    assert same(weights(module), weights(plain_loop(settings, accumulated)))
    assert not same(weights(module), weights(plain_loop(BackSlash(strength=0.0), accumulated)))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module, BackSlashCallback, pl.Trainer]:
    folder = tmp_path_factory.mktemp("unbroken")
    module, callback = Module(), BackSlashCallback(**TARGET)
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    trainer = fit(module, callback, saving)
    return folder, module, callback, trainer


Unbroken = tuple[Path, Module, BackSlashCallback, pl.Trainer]


def test_resumed_it_ends_with_the_same_bits(unbroken: Unbroken) -> None:
    folder, module, callback, _ = unbroken
    resumed, again = Module(seed=7), BackSlashCallback(BackSlash(total_steps=STEPS, **TARGET))
    fit(resumed, again, checkpoint=folder / "step=5.ckpt")
    assert same(weights(module), weights(resumed))
    assert callback.regularizer is not None
    assert again.regularizer is not None
    state, expected = again.regularizer.state_dict(), callback.regularizer.state_dict()
    assert torch.equal(state.pop("fits"), expected.pop("fits"))
    assert state == expected


def test_the_state_in_a_checkpoint_is_plain_and_without_it_a_fit_ends_elsewhere(
    unbroken: Unbroken, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, module, _, _ = unbroken
    checkpoint = torch.load(folder / "step=5.ckpt", weights_only=True)
    key = BackSlashCallback(strength=1.0).state_key
    assert checkpoint["callbacks"].pop(key)["rate"]["steps"] == 5
    torch.save(checkpoint, tmp_path / "stripped.ckpt")
    resumed, callback = Module(), BackSlashCallback(**TARGET)
    fit(resumed, callback, checkpoint=tmp_path / "stripped.ckpt")
    assert not same(weights(module), weights(resumed))
    assert "holds no state of BackSlashCallback" in caplog.text
    assert callback.regularizer is not None
    assert callback.regularizer.steps == callback.regularizer.settings.total_steps == 5


def test_steps_come_from_the_trainer_and_bits_are_in_its_metrics(unbroken: Unbroken) -> None:
    _, module, callback, trainer = unbroken
    assert callback.regularizer is not None
    assert callback.regularizer.settings.total_steps == STEPS
    state = callback.regularizer.state_dict()
    for name, value in (
        ("bits_per_weight", state["measured_bits"]),
        ("rate_strength", state["strength"]),
        ("zeros", state["measured_zeros"]),
    ):
        # The progress bar shows float32 figures.
        assert trainer.progress_bar_metrics[name] == pytest.approx(value, rel=2**-23)
    assert sum(int((weight == 0).sum()) for weight in weights(module)) > 5


def test_a_fit_without_an_end_takes_no_shares() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any, **named: Any) -> None:
            trainer.should_stop = trainer.global_step >= 2

    module, callback = Module(), BackSlashCallback(strength=1e-3)
    fit(module, callback, Stop(), max_steps=-1)
    assert callback.regularizer is not None
    assert callback.regularizer.settings.total_steps is None
    assert callback.regularizer.steps == 2
    with pytest.raises(InputError, match="needs total_steps"):
        fit(Module(), BackSlashCallback(strength=1e-3, schedule=Schedule(tail=0.2)), Stop(), max_steps=-1)


def test_several_optimizers_are_stepped_each_at_its_own_rate() -> None:
    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0)]

        def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
            loss = super().training_step(batch, index)
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()

    module = Two()
    module.automatic_optimization = False
    before, callback = weights(module), BackSlashCallback(strength=0.05)
    fit(module, callback, max_steps=8)
    assert callback.regularizer is not None
    assert callback.regularizer.steps == 4
    assert callback.regularizer.settings.total_steps is None
    assert int((module.net[0].weight == 0).sum()) > 0
    assert torch.equal(before[2], module.net[2].weight)


def test_an_interrupted_fit_leaves_no_hooks() -> None:
    class Broken(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, index)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.made = super().configure_optimizers()
            return self.made

    module = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, BackSlashCallback(strength=1e-3))
    assert not module.made._optimizer_step_post_hooks
    assert not module.made._optimizer_step_pre_hooks
