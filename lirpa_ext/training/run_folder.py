"""The folder of a run: configuration, environment, metrics, learning curve, checkpoints, network, model card.

======================  ==============================================================================================
``config.yaml``         the whole configuration, with defaults
``environment.json``    versions, device, seed
``metrics.csv``         one row an epoch: loss, eps, kappa, beta, lambda, learning rate, seconds, clean, PGD, verified
``learning_curve.png``  the same as a plot
``last.ckpt``           to resume from
``best.ckpt``           most verified validation samples since the end of the ramp
``model.pt``            the best network, for `lirpa_ext.models.loading.load_model` and ``lirpa-ext certify``
``model.onnx``          the same as ONNX, of any batch size; not of a randomized network
``README.md``           the model card
======================  ==============================================================================================
"""

from __future__ import annotations

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
from ..models.loading import save_model
from ..reporting.files import replacing, write_csv, write_tensors, write_whole
from ..reporting.plots import save
from .card import write_card
from .checkpoints import cut_short
from .learning_curve import plot_metrics
from .module import CertifiedClassifier

__all__ = ["Metrics", "environment", "export_onnx", "save_network", "write_environment"]

COLUMNS = (
    "epoch", "step", "loss", "eps", "kappa", "beta", "graddiv", "lr", "seconds", "val_clean", "val_pgd", "val_verified",
    "ramp_done",
)  # fmt: skip


class Metrics(Checkpoint):
    """Callback that writes ``metrics.csv`` and ``learning_curve.png`` after each epoch.

    The rows are in the checkpoints, so that a resumed run neither loses nor repeats one. The class derives from
    Lightning's ``Checkpoint`` to run after the module's own hooks and before the callbacks that save.

    Args:
        folder: Folder of the run.

    Attributes:
        rows: One dict for each epoch so far, with the keys `COLUMNS`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._validation: dict[str, float] = {}
        self._start, self._before, self._ended = time.perf_counter(), 0.0, False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._start, self._ended = time.perf_counter(), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the validation for the row of this epoch; some epochs have no validation."""
        self._validation = {name: value for name, value in _metrics(trainer).items() if name.startswith("val_")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row of the epoch, and write the files."""
        if cut_short(trainer):
            return
        metrics = {name: value for name, value in _metrics(trainer).items() if not name.startswith("val_")}
        metrics |= self._validation
        self._validation = {}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "seconds": self._elapsed()}
        self._before, self._ended = 0.0, True
        row |= {name: metrics[name] for name in COLUMNS if name in metrics}
        row["ramp_done"] = bool(getattr(pl_module, "ramp_done", True))
        self.rows.append(row)
        if trainer.is_global_zero:
            write_csv(self.folder / "metrics.csv", COLUMNS, self.rows)
            save(plot_metrics(self.rows), self.folder / "learning_curve.png")

    def _elapsed(self) -> float:
        return round(self._before + time.perf_counter() - self._start, 3)

    def state_dict(self) -> dict[str, Any]:
        """The rows, and for an epoch that has not ended its validation metrics and the seconds spent."""
        return {"rows": self.rows, "validation": self._validation, "before": 0.0 if self._ended else self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows, validation metrics and seconds."""
        self.rows, self._before = list(state_dict["rows"]), float(state_dict["before"])
        self._validation = dict(state_dict.get("validation", {}))


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in trainer.callback_metrics.items()}


def environment(trainer: Trainer, seed: int) -> dict[str, Any]:
    """Versions, machine and seed, on which results may depend besides the configuration."""
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
    """Write ``model.pt``, ``model.onnx`` (except for a randomized network) and the model card.

    Args:
        module: The trained module; its network is moved to the CPU and put in eval mode.
        folder: Folder of the run.

    Raises:
        ResultsError: A file cannot be written.
    """
    model, network = module.model.cpu().eval(), module.network
    if ":" in network.name:  # code of the user, which load_model(path, "package.module:callable") must name
        write_tensors(folder / "model.pt", model.state_dict())
    else:
        save_model(model, folder / "model.pt", "lirpa_ext.models.architectures:named_network", **vars(network))
    if not module.randomized:  # a traced network would have one draw fixed
        export_onnx(model, network.input_shape, folder / "model.onnx")
    write_card(folder)


def write_environment(trainer: Trainer, seed: int, rates: list[list[float]], folder: Path) -> None:
    """Write ``environment.json`` into the folder of a run.

    Args:
        trainer: Trainer of the run.
        seed: Seed of the run.
        rates: [step, learning rate] of each change of the learning rate on resuming.
        folder: Folder of the run.

    Raises:
        ResultsError: The file cannot be written.
    """
    changes = {"learning_rates": rates} if rates else {}
    text = json.dumps(environment(trainer, seed) | changes, indent=1) + "\n"
    write_whole(folder / "environment.json", text)


def export_onnx(model: nn.Module, input_shape: list[int], path: Path) -> None:
    """Write a classifier as an ONNX file that takes any batch size.

    Args:
        model: The classifier, in eval mode.
        input_shape: Shape of one image, (C, H, W).
        path: File to write.

    Raises:
        ResultsError: The file cannot be written.
    """
    dtype = next((value.dtype for value in model.parameters()), None)
    image = torch.zeros(1, *input_shape, dtype=dtype)
    with replacing(path) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another exporter
        torch.onnx.export(
            model, (image,), written, dynamo=False, opset_version=17, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
