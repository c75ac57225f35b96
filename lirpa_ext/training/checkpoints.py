"""The checkpoints of a run: ``last.ckpt``, from which it is resumed, and ``best.ckpt``, the network to use.

A run that is killed at any moment and resumed gives the same result as one that was not killed. Three rules ensure
this. A state is saved after a step of the optimizer, never between batches whose gradients are accumulated. No state is
saved right before a validation (at the last batch of an epoch), since a resumed run would skip the validation; the
state at the end of an epoch is saved after it. A file is replaced as a whole, by a state whose weights are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import ConfigError, LirpaExtError
from ..reporting.files import write_tensors

__all__ = ["Best", "Checkpoints", "Last", "State", "cut_short", "read_checkpoint"]


class Checkpoints(TorchCheckpointIO):
    """Plugin of Lightning's trainer that replaces checkpoints as whole files, and reads them without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the file is replaced as a whole.

        Raises:
            ResultsError: The file cannot be written.
        """
        write_tensors(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, see `read_checkpoint`; the other arguments are not used."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this trainer: tensors, on the CPU, and plain values. No code of the file is run.

    Args:
        path: The file.

    Returns:
        Lightning's checkpoint dict.

    Raises:
        ConfigError: The file is missing or truncated, or another program wrote it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"], content["lirpa_ext"]["network"]
    except LirpaExtError:
        raise
    except Exception as error:  # zip, pickle and torch raise whatever comes
        raise ConfigError(
            f"{path} is missing, truncated or no checkpoint of this trainer: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    return content  # type: ignore[no-any-return]


class Best(Checkpoint):
    """Callback that keeps ``best.ckpt``, the epoch after the ramp with the highest verified validation accuracy.

    Of equal epochs, the one with the higher clean accuracy is better. For a randomized network, of which nothing is
    verified, the accuracy under EOT-PGD takes the place of the verified accuracy. Epochs without validation are
    skipped.

    Args:
        folder: Folder of the run.

    Attributes:
        score: Verified (or PGD) and clean accuracy of the best epoch; None before the first one.
        epoch: Number of the best epoch, from 0; None before the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "best.ckpt"
        self.score: tuple[float, float] | None = None
        self.epoch: int | None = None
        self._validated = -1  # step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step at which the validation ran."""
        self._validated = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint if this epoch is the best so far."""
        metrics = trainer.callback_metrics
        judged = next((name for name in ("val_verified", "val_pgd") if name in metrics), None)
        validated = self._validated == trainer.global_step
        if judged is None or not validated or not getattr(pl_module, "ramp_done", True) or cut_short(trainer):
            return
        score = (float(metrics[judged]), float(metrics["val_clean"]))
        if self.score is None or score > self.score:
            self.score, self.epoch = score, trainer.current_epoch
            trainer.save_checkpoint(self.path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Score and number of the best epoch."""
        return {"score": self.score and list(self.score), "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore score and number of the best epoch."""
        score = state_dict["score"]
        self.score, self.epoch = score and (score[0], score[1]), state_dict["epoch"]


class Last(Checkpoint):
    """Callback that keeps ``last.ckpt``, from which a killed run is resumed with the same result.

    Args:
        folder: Folder of the run.
        every: Steps between two checkpoints within an epoch, default 0: at the ends of epochs only.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self._step, self._due = 0, False
        self._ended = self._stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the step count of the trainer."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save a checkpoint every `every` steps, as far as the rules at the top of this file allow."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        self._due |= bool(self.every) and self._step % self.every == 0
        if (self._due or cut_short(trainer)) and _resumable(trainer) and not _validation_follows(trainer):
            self._due = False
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint at the end of an epoch, unless the time ran out within the epoch."""
        if not cut_short(trainer):
            self._due, self._ended = False, True
            left = _time_left(trainer)
            self._stopped = trainer.should_stop and (left is None or left > 0)
            trainer.save_checkpoint(self.path, weights_only=False)
            self._ended = self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """Whether the checkpoint is from the end of an epoch, and whether another callback stopped the training."""
        return {"ended": self._ended, "stopped": self._stopped}


@dataclass(frozen=True)
class State:
    """Progress of a run, read from its ``last.ckpt``.

    Attributes:
        content: The checkpoint, see `read_checkpoint`.
        path: The file.
    """

    content: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """Read the state from the folder of a run; None if there is no ``last.ckpt``.

        Raises:
            ConfigError: ``last.ckpt``, or the ``best.ckpt`` to which it refers, cannot be read.
        """
        path = folder / "last.ckpt"
        if not path.exists():
            return None
        anew = "Put a copy of it in its place, or start anew by --resume false"
        try:
            state = cls(read_checkpoint(path), path)
            best = state._of("Best").get("epoch")
            if best is not None:
                kept = cls(read_checkpoint(folder / "best.ckpt"), folder / "best.ckpt")
                if not kept.network == state.network or kept._of("Best").get("epoch", -1) < best:
                    raise ConfigError(f"{kept.path} is not the network that {path.name} calls the best so far")
        except ConfigError as error:
            raise ConfigError(f"{error}. {anew}") from error
        return state

    @property
    def network(self) -> dict[str, Any]:
        """The fields of the `Network` that was trained."""
        return dict(self.content["lirpa_ext"]["network"])

    @property
    def rates(self) -> list[list[float]]:
        """[step, learning rate] of each change that ``--resume_lr`` made."""
        return list(self.content["lirpa_ext"].get("rates", []))

    def finished(self, max_epochs: int | None, max_steps: int) -> bool:
        """Whether the training is complete.

        Args:
            max_epochs: Epochs of the training; None or -1 for no limit.
            max_steps: Steps of the training; -1 for no limit.

        Raises:
            ConfigError: More than `max_epochs` epochs have begun.
        """
        step, begun = int(self.content["global_step"]), int(self.content["epoch"]) + 1
        if max_epochs not in (None, -1) and begun > max_epochs:  # type: ignore[operator]
            raise ConfigError(
                f"{self.path} is in epoch {begun}, and trainer.max_epochs is {max_epochs}: raise it, or start anew by "
                "--resume false"
            )
        if not self._of("Last").get("ended"):
            return False
        out = 0 <= max_steps <= step or (max_epochs not in (None, -1) and begun == max_epochs)
        return out or bool(self._of("Last")["stopped"])

    def _of(self, callback: str) -> dict[str, Any]:
        """Saved state of one of this module's callbacks; {} if there is none."""
        return dict(self.content.get("callbacks", {}).get(callback, {}))


def _time_left(trainer: Trainer) -> float | None:
    """Seconds left of ``trainer.max_time``; None if it is not set."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return min((left for timer in timers if (left := timer.time_remaining()) is not None), default=None)


def cut_short(trainer: Trainer) -> bool:
    """Whether the time ran out before the last batch of the epoch: the epoch is not judged, and resumed later."""
    return trainer.should_stop and _time_left(trainer) is not None and not trainer.is_last_batch


def _validation_follows(trainer: Trainer) -> bool:
    """Whether a validation follows this batch; an epoch that is cut short does not count."""
    every = trainer.val_check_batch
    batch = trainer.fit_loop.epoch_loop.batch_idx
    done = trainer.fit_loop.epoch_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch
    at = every is None or (every != float("inf") and (done + 1) % every == 0)  # None: by the clock
    return trainer.is_last_batch or at or (trainer.should_stop and not cut_short(trainer))


def _resumable(trainer: Trainer) -> bool:
    """Whether the training loader can be resumed within an epoch."""
    loaders = trainer.train_dataloader
    return hasattr(loaders, "state_dict") and hasattr(loaders, "load_state_dict")
