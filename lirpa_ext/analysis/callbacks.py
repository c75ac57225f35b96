"""Callbacks of Lightning's trainer that record, after each epoch, the layers' Lipschitz constants and ReLU activity."""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ..errors import ConfigError
from ..reporting.plots import save
from ..reporting.results import Row
from ..training.module import CertifiedClassifier
from .lower_slopes import has_slopes
from .traces import ActivityTrace, LipschitzTrace, Trace, activity_record, lipschitz_records

__all__ = ["EveryEpoch", "LipschitzConstants", "ReluActivity"]


class EveryEpoch(Callback):
    """Base class of callbacks that record measures of the network before the first epoch and after each epoch.

    A subclass sets `KIND` and implements `measured`. The records are in the checkpoints, so that a resumed run keeps
    them. Recording does not change the training: a copy of the network is measured, in eval mode and on the CPU, and
    the state of torch's generator is restored. Of several processes only the first records, on its share of the batch.

    Attributes:
        KIND: Class of the trace that the records make.
        records: The records so far.
    """

    KIND: ClassVar[type[Trace]]

    def __init__(self) -> None:
        self.records: list[Row] = []
        self._batch: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def measured(self, module: CertifiedClassifier, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Row]:
        """Measure a copy of the network.

        Args:
            module: The module that is trained.
            model: Copy of its network, in eval mode, on the CPU.
            x: Images of the last batch, (B, C, H, W).
            y: Labels of the last batch, (B,).
            eps: Radius at this time.

        Returns:
            Records without the keys run, epoch, step and eps.
        """

    @property
    def trace(self) -> Trace:
        """The records so far, as a trace."""
        return self.KIND(tuple(self.records))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module that is trained.

        Raises:
            ConfigError: The module is no `CertifiedClassifier`.
        """
        if not isinstance(pl_module, CertifiedClassifier):
            raise ConfigError(
                f"{type(self).__name__} records a CertifiedClassifier, not a {type(pl_module).__name__}: for other "
                "networks call lirpa_ext.lipschitz or lirpa_ext.analysis.relu_activity"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch; before the first step of the training, record the initial network."""
        assert isinstance(pl_module, CertifiedClassifier)
        x, y = batch
        self._batch = (x.detach(), y)
        if not self.records and trainer.global_step == 0:
            self._record(trainer, pl_module, 0, pl_module.values().eps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record, and write the JSON and CSV files."""
        assert isinstance(pl_module, CertifiedClassifier)
        values = pl_module.schedule.at(pl_module.global_step - 1, pl_module.steps_per_epoch, pl_module.eps)
        self._record(trainer, pl_module, trainer.current_epoch + 1, values.eps)
        if trainer.is_global_zero:
            self.trace.save(Path(trainer.default_root_dir) / self.KIND.NAME)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the plot."""
        if trainer.is_global_zero and self.records:
            save(self.trace.figure(), Path(trainer.default_root_dir) / f"{self.KIND.NAME}.png")

    def _record(self, trainer: Trainer, module: CertifiedClassifier, epoch: int, eps: float) -> None:
        if self._batch is None or not trainer.is_global_zero:
            return
        where = {"run": "this run", "epoch": epoch, "step": trainer.global_step, "eps": eps}
        model, (x, y) = copy.deepcopy(module.model).cpu().eval(), self._batch
        with torch.random.fork_rng():
            self.records += [where | row for row in self.measured(module, model, x.cpu(), y.cpu(), eps)]

    def state_dict(self) -> dict[str, Any]:
        """The records so far, for the checkpoint."""
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the records from a checkpoint."""
        self.records = list(state_dict["records"])


class LipschitzConstants(EveryEpoch):
    """Records bounds on the spectral norms of all layers after each epoch: ``lipschitz.json``, ``.csv`` and ``.png``.

    In a configuration::

        trainer:
          callbacks:
            - class_path: lirpa_ext.analysis.LipschitzConstants

    The cost of a record is that of `lirpa_ext.lipschitz`.
    """

    KIND = LipschitzTrace

    def measured(self, module: CertifiedClassifier, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Row]:
        """Bounds on the spectral norms, see `lirpa_ext.analysis.traces.lipschitz_records`."""
        return lipschitz_records(model, x)


class ReluActivity(EveryEpoch):
    """Records ReLU activity at the scheduled eps after each epoch: ``activity.json``, ``.csv`` and ``.png``.

    It is measured on the first samples of the epoch's last batch. Lower slopes are those of the method that verifies
    the loss, if that method has lower slopes.

    Args:
        samples: Largest number of samples, default 64.

    Raises:
        ConfigError: `samples` is below 1.
    """

    KIND = ActivityTrace

    def __init__(self, samples: int = 64) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"ReluActivity takes samples of 1 or more, got {samples}")
        self.samples = samples

    def measured(self, module: CertifiedClassifier, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Row]:
        """ReLU activity, see `lirpa_ext.analysis.traces.activity_record`."""
        x, y = x[: self.samples], y[: self.samples]
        bound = module.loss.objective.verify
        method = bound if has_slopes(bound) else None
        low, high = module.data_range
        return [activity_record(model, x, y, eps, method, norm=module.norm, x_L=low, x_U=high)]
