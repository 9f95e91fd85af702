"""min D(θ) + λ·R(θ) in Lightning: BackSlash as a Callback."""

import math
from typing import Any

import torch

from ggpass.integrations.callback import RateCallback

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError(f"the Lightning callback needs {error.name}: pip install 'ggpass[lightning]'") from error


class BackSlashCallback(RateCallback, pl.Callback):
    """Trainer(callbacks=[BackSlashCallback(target_bits=1.5)]): few bits, beside the module's own optimizers.

    1. Each step of an optimizer counts once: an accumulated batch is one, one that AMP skipped is none.
    2. The number of steps comes from the Trainer, so that schedules may be given in shares; not if a fit has no end
       or a module has several optimizers: give `total_steps` there, in steps of the first one.
    3. `bits_per_weight`, `rate_strength` (λ) and `zeros` are logged at every step, and the progress bar shows them.
    4. The state goes into Lightning's checkpoints, as numbers and one tensor, and `fit(ckpt_path=…)` continues bit
       for bit.

    FSDPStrategy and DeepSpeed keep flat copies of the weights: shard with ModelParallelStrategy (FSDP2) instead.
    Several optimizers are stepped in their order.

    Attributes:
        regularizer: the Regularizer of the current or the last fit; None before the first.
    """

    _saved: dict[str, Any] | None = None

    # For Lightning.

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Attach, once weights and optimizers are sharded and restored, and continue from the checkpoint.

        Raises:
            WeightError, InputError: as `BackSlash.attach`.
        """
        saved, self._saved = self._saved, None
        total = trainer.estimated_stepping_batches
        # With several optimizers Lightning's count is of all their steps.
        countable = len(trainer.optimizers) == 1 and not math.isinf(total) and total > 0
        last = int(total) if countable else None
        self.start(
            pl_module, trainer.optimizers, step=trainer.global_step, last_step=last, saved=saved, who=self.state_key
        )

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the bits, λ and the zeros."""
        for name, value in self.figures().items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float32), prog_bar=True, batch_size=1)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take the hooks off the optimizers."""
        self.detach()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Take the hooks off the optimizers."""
        self.detach(finished=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the entry of Lightning's checkpoints: numbers and one tensor, which `weights_only` loads."""
        return self.saved_state() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit begins."""
        self._saved = state_dict or None
