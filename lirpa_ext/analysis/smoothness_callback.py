"""`Smoothness`: a callback of Lightning's trainer that measures how smooth the loss is while it is trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..errors import ConfigError
from ..reporting.plots import save
from ..reporting.results import Row
from ..training.module import CertifiedClassifier
from ..training.schedules import Values
from .landscape import SmoothnessTrace, log_lengths, plot_smoothness, record, smoothness

__all__ = ["Smoothness"]


class Smoothness(Callback):
    """Callback that measures `lirpa_ext.analysis.smoothness` at regular steps, and writes it to the run's folder.

    The loss is that of the step's batch, at the weights before and after the optimizer's step. It is measured at the
    scheduled eps (Fig. 3.6 and 3.7 of Lee (2021)) and at the end of the schedule (Fig. 3.8). Measuring does not change
    the training: weights, buffers, power iterations and torch's generator are restored exactly. All evaluations of one
    measurement use the same random draws, and start power iterations from the same vectors.

    A measurement takes 2 gradients and `points` losses for each loss. With the default of 10 points that took as long
    as 6 to 9 steps of training (``benchmarks/smoothness_cost.py``), and twice as long with `target` before the end of
    the ramp; with ``every=100`` a run takes 6 to 18% longer. The memory holds copies of the weights.

    In a configuration::

        trainer:
          callbacks:
            - class_path: lirpa_ext.analysis.Smoothness
              init_args: {every: 100}

    Of several processes only the first measures, on its share of the batch. The records are in the checkpoints, so that
    a resumed run keeps them.

    Args:
        every: Optimizer steps between two measurements, default 100.
        target: Whether to measure the loss at the end of the schedule too, default True.
        points: Number of step lengths along the gradient, default 10.
        longest: The longest step length, in units of a gradient-descent step, default 5.
        name: Name of the files ``NAME.json``, ``.csv`` and ``.png``, default "smoothness".

    Raises:
        ConfigError: `every` or `points` is below 1, or `longest` is not positive.
    """

    def __init__(
        self, every: int = 100, target: bool = True, points: int = 10, longest: float = 5.0, name: str = "smoothness"
    ) -> None:
        if every < 1 or points < 1 or not longest > 0:
            raise ConfigError(
                f"Smoothness takes every and points of 1 or more and a positive longest, got {every}, {points} and "
                f"{longest}"
            )
        self.every, self.target, self.name = every, target, name
        self.lengths = log_lengths(points, longest)
        self.records: list[Row] = []
        self._start: tuple[int, Values, list[Tensor]] | None = None  # step, values and weights before a measured step

    @property
    def trace(self) -> SmoothnessTrace:
        """The records so far, as a trace."""
        return SmoothnessTrace(tuple(self.records))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module that is trained.

        Raises:
            ConfigError: The module is no `CertifiedClassifier`.
        """
        if not isinstance(pl_module, CertifiedClassifier):
            raise ConfigError(
                f"Smoothness measures the loss of a CertifiedClassifier, not of a {type(pl_module).__name__}: for "
                "other losses call lirpa_ext.analysis.smoothness"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the weights before a step that is measured."""
        assert isinstance(pl_module, CertifiedClassifier)
        self._start = None
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            weights = [weight.detach().clone() for weight in _weights(pl_module)]
            self._start = (trainer.global_step, pl_module.values(), weights)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the step."""
        assert isinstance(pl_module, CertifiedClassifier)
        if self._start is None or trainer.global_step == self._start[0]:  # gradients were only accumulated
            return
        step, scheduled, before = self._start
        self._start = None
        schedule, per_epoch = pl_module.schedule, pl_module.steps_per_epoch
        target = schedule.at(schedule.steps(per_epoch), per_epoch, pl_module.eps)
        wanted = {"scheduled": scheduled} | ({"target": target} if self.target else {})
        step_size = float(trainer.optimizers[0].param_groups[0]["lr"])
        found: dict[Values, Row] = {}
        for at, values in wanted.items():
            where: Row = {"step": step, "epoch": trainer.current_epoch, "at": at}
            if values in found:  # after the ramp both losses are the same: nothing more is measured
                self.records.append(where | found[values] | {"seconds": 0.0})
                continue
            found[values] = self._measured(pl_module, batch, before, values, step_size)
            self.records.append(where | found[values])

    def _measured(
        self, module: CertifiedClassifier, batch: tuple[Tensor, Tensor], before: list[Tensor], values: Values, lr: float
    ) -> Row:
        start = time.perf_counter()
        weights = _weights(module)
        after = [weight.detach().clone() for weight in weights]
        with _undone(module) as again:

            def loss_fn() -> Tensor:
                again()
                return module.batch_loss(*batch, values)

            try:
                with torch.no_grad():
                    for weight, value in zip(weights, before, strict=True):
                        weight.copy_(value)
                measures = smoothness(loss_fn, weights, lr, after, self.lengths)
            finally:
                with torch.no_grad():
                    for weight, value in zip(weights, after, strict=True):
                        weight.copy_(value)
        return record(measures, time.perf_counter() - start, **asdict(values), step_size=lr)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the numbers and the plot."""
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and self.records:
            self.trace.save(folder / self.name)
            save(plot_smoothness({"this run": self.trace}), folder / f"{self.name}.png")

    def state_dict(self) -> dict[str, Any]:
        """The records so far, for the checkpoint."""
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the records from a checkpoint."""
        self.records = list(state_dict["records"])


def _weights(module: CertifiedClassifier) -> list[Tensor]:
    return [weight for weight in module.model.parameters() if weight.requires_grad]


@contextlib.contextmanager
def _undone(module: CertifiedClassifier) -> Iterator[Any]:
    """Context at whose end the state that a loss evaluation changes, except the weights, is restored.

    The state consists of the network's buffers, the vectors of the power iterations, and torch's generator. The context
    yields a function that resets this state (the generator to the module's seed). When it is called before each
    evaluation, the loss is a function of the weights alone: all evaluations have the same draws, and their power
    iterations the same start.
    """
    buffers = {name: value.detach().clone() for name, value in module.model.named_buffers()}
    iterations = {} if module.bounded is None else module.bounded.power_iterations  # randomized networks have no graph
    vectors = {name: iteration.u.detach().clone() for name, iteration in iterations.items()}

    @torch.no_grad()
    def again() -> None:
        for name, value in module.model.named_buffers():
            value.copy_(buffers[name])
        for name, iteration in iterations.items():
            iteration.load_state_dict({"u": vectors[name]})
        torch.manual_seed(module.seed)

    with torch.random.fork_rng():
        try:
            yield again
        finally:
            again()
