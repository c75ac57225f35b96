"""What is kept of a run, and when: ``last.ckpt`` to go on from, ``best.ckpt`` to ship.

A run that is killed at any moment and started again ends as one that was not. Three rules make it so. A state is saved
after a step of the optimizer, never between the batches whose gradients are added up. It is never saved where a
validation comes next (the last batch of an epoch): that validation would be skipped, so the state at the end of the
epoch is saved after it. And a file is replaced as a whole, by a state whose weights are finite.
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
    """Lightning's plugin that writes and reads checkpoints: whole files, which run nothing when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace the file as a whole."""
        write_tensors(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this trainer, its tensors on the CPU; nothing that it names is run.

    Raises:
        ConfigError: It is missing, truncated, or of another program.
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
    """Keeps ``best.ckpt``: most verified validation samples among the epochs after the ramp; a tie goes to more clean.

    Of a randomized network, of which nothing is verified, those that withstand EOT-PGD count. An epoch without a
    validation is not judged.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "best.ckpt"
        self.score: tuple[float, float] | None = None
        self.epoch: int | None = None
        self._validated = -1  # step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note at which step the metrics are of."""
        self._validated = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's weights if they are the best so far."""
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
        """The best score and its epoch."""
        return {"score": self.score and list(self.score), "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        score = state_dict["score"]
        self.score, self.epoch = score and (score[0], score[1]), state_dict["epoch"]


class Last(Checkpoint):
    """Keeps ``last.ckpt``, from which a killed run goes on to the same result.

    Args:
        folder: Of the run.
        every: Steps between two within an epoch; 0 for the ends of epochs only.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self._step, self._due = 0, False
        self._ended = self._stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on counting."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save every so many steps, where the rules at the top of this file let it."""
        if trainer.global_step == self._step:  # gradients are being added up
            return
        self._step = trainer.global_step
        self._due |= bool(self.every) and self._step % self.every == 0
        if (self._due or cut_short(trainer)) and _resumable(trainer) and not _validation_follows(trainer):
            self._due = False
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, unless its time is out before that."""
        if not cut_short(trainer):
            self._due, self._ended = False, True
            left = _time_left(trainer)
            self._stopped = trainer.should_stop and (left is None or left > 0)
            trainer.save_checkpoint(self.path, weights_only=False)
            self._ended = self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """Whether an epoch has ended, and the training with it, by a callback that stops it early."""
        return {"ended": self._ended, "stopped": self._stopped}


@dataclass(frozen=True)
class State:
    """Where a run is, by its ``last.ckpt``.

    Attributes:
        content: The checkpoint.
        path: Of the file.
    """

    content: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """The state of a run's folder, None for one that has none yet.

        Raises:
            ConfigError: ``last.ckpt`` or the ``best.ckpt`` that it counts on cannot be read.
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
        """Which network it is of."""
        return dict(self.content["lirpa_ext"]["network"])

    @property
    def rates(self) -> list[list[float]]:
        """[step, learning rate] of each change that `--resume_lr` made."""
        return list(self.content["lirpa_ext"].get("rates", []))

    def finished(self, max_epochs: int | None, max_steps: int) -> bool:
        """Whether nothing is left to train.

        Raises:
            ConfigError: More epochs or steps are done than these.
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
        """State of a callback of ours."""
        return dict(self.content.get("callbacks", {}).get(callback, {}))


def _time_left(trainer: Trainer) -> float | None:
    """Seconds that ``trainer.max_time`` leaves, None without it."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return min((left for timer in timers if (left := timer.time_remaining()) is not None), default=None)


def cut_short(trainer: Trainer) -> bool:
    """Whether the epoch ends before its last batch because time is out: it counts for nothing, and goes on later."""
    return trainer.should_stop and _time_left(trainer) is not None and not trainer.is_last_batch


def _validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes right after this batch, other than that of an epoch which is cut short."""
    every = trainer.val_check_batch
    batch = trainer.fit_loop.epoch_loop.batch_idx
    done = trainer.fit_loop.epoch_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch
    at = every is None or (every != float("inf") and (done + 1) % every == 0)  # None: by the clock
    return trainer.is_last_batch or at or (trainer.should_stop and not cut_short(trainer))


def _resumable(trainer: Trainer) -> bool:
    """Whether the data can go on within an epoch."""
    loaders = trainer.train_dataloader
    return hasattr(loaders, "state_dict") and hasattr(loaders, "load_state_dict")
