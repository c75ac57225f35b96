"""The folder of a run: configuration, environment, metrics, learning curve, checkpoints, network, model card.

======================  ==============================================================================================
``config.yaml``         the whole configuration, with defaults
``environment.json``    versions, device, seed
``metrics.csv``         one row an epoch: loss, eps, kappa, beta, lambda, learning rate, seconds, clean, PGD, verified
``learning_curve.png``  the same as a plot
``last.ckpt``           to resume from
``best.ckpt``           most verified validation samples since the end of the ramp
``model.pt``            the best network, for `lirpa_ext.loading.load_model` and ``lirpa-ext certify``
``model.onnx``          the same as ONNX, of any batch size; not of a randomized network
``README.md``           the model card
======================  ==============================================================================================
"""

from __future__ import annotations

import csv
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from .. import engine
from .._version import __version__
from ..analysis.plots import save
from ..loading import save_model
from .card import write_card
from .learning_curve import plot_metrics
from .module import CertifiedClassifier

__all__ = ["Best", "Last", "Metrics", "environment", "export_onnx", "save_network"]

COLUMNS = (
    "epoch", "step", "loss", "eps", "kappa", "beta", "graddiv", "lr", "seconds", "val_clean", "val_pgd", "val_verified",
    "ramp_done",
)  # fmt: skip


class Metrics(Checkpoint):
    """Writes ``metrics.csv`` and ``learning_curve.png`` after each epoch. Rows are in the checkpoints: none is lost,
    and none is there twice, when a run goes on. A `Checkpoint` for its place: after the module's own hook, before
    those that save.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._start, self._before = time.perf_counter(), 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row of the epoch."""
        metrics = {name: float(f"{float(value):.6g}") for name, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "seconds": self._elapsed()}
        self._before = 0.0
        row |= {name: metrics[name] for name in COLUMNS if name in metrics}
        row["ramp_done"] = bool(getattr(pl_module, "ramp_done", True))
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.rows, self.folder / "metrics.csv")
            save(plot_metrics(self.rows), self.folder / "learning_curve.png")

    def _elapsed(self) -> float:
        return round(self._before + time.perf_counter() - self._start, 3)

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, and seconds spent in an epoch that has not ended."""
        ended = bool(self.rows) and self._before == 0.0 and self.rows[-1].get("seconds") is not None
        return {"rows": self.rows, "before": 0.0 if ended else self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.rows, self._before = list(state_dict["rows"]), float(state_dict["before"])


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """One line a row, in the order of `COLUMNS`; what a row lacks is left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


class Best(Checkpoint):
    """Keeps ``best.ckpt``: most verified validation samples among the epochs after the ramp; a tie goes to more clean.

    Of a randomized network, of which nothing is verified, those that withstand EOT-PGD count.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "best.ckpt"
        self.score: tuple[float, float] | None = None
        self.epoch: int | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's weights if they are the best so far."""
        metrics = trainer.callback_metrics
        judged = next((name for name in ("val_verified", "val_pgd") if name in metrics), None)
        if judged is None or not getattr(pl_module, "ramp_done", True):
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

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save every so many steps."""
        if self.every and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        trainer.save_checkpoint(self.path, weights_only=False)


def environment(trainer: Trainer, seed: int) -> dict[str, Any]:
    """What a figure may depend on besides the configuration."""
    return {
        "package_version": __version__,
        "engine": f"auto_LiRPA {engine.engine_version()}",
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "accelerator": type(trainer.accelerator).__name__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "seed": seed,
    }


def save_network(module: CertifiedClassifier, folder: Path) -> None:
    """Write ``model.pt`` and ``model.onnx``, and the model card."""
    model, network = module.model.cpu().eval(), module.network
    if ":" in network.name:  # whose code only the user may name: load_model(path, "package.module:callable")
        torch.save(model.state_dict(), folder / "model.pt")
    else:
        save_model(model, folder / "model.pt", "lirpa_ext.training.architectures:named_network", **vars(network))
    if not module.randomized:  # a trace would hold one draw for ever
        export_onnx(model, network.input_shape, folder / "model.onnx")
    write_card(folder)


def write_environment(trainer: Trainer, seed: int, folder: Path) -> None:
    """Write ``environment.json``."""
    text = json.dumps(environment(trainer, seed), indent=1) + "\n"
    (folder / "environment.json").write_text(text, encoding="utf-8")


def export_onnx(model: nn.Module, input_shape: list[int], path: Path) -> None:
    """Write a classifier as ONNX, of any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another exporter
        torch.onnx.export(
            model, (torch.zeros(1, *input_shape),), path, dynamo=False, opset_version=17, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
