"""A run from its configuration: parse, check, fit or resume, and certify what came out. `lirpa-ext fit` calls this."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..certify import certify
from ..data import gather
from ..errors import ConfigError, LirpaExtError
from ..report import Report
from .card import write_card
from .module import CertifiedClassifier
from .randomized import EnsembleReport, ensemble_report
from .run_folder import Best, Last, Metrics, save_network, write_environment

__all__ = ["evaluate", "fit", "parse", "parser"]

# What may change between the parts of one run; anything else would make it another run.
_FREE = {"config", "run", "resume", "checkpoint", "checkpoint_every", "progress"}
_FREE_OF_TRAINER = {
    "accelerator", "devices", "num_nodes", "strategy", "max_epochs", "max_steps", "max_time", "logger", "callbacks",
    "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler", "num_sanity_val_steps",
}  # fmt: skip


def parser(command: str = "fit") -> ArgumentParser:
    """Parser of a configuration: YAML files by ``--config``, and every key as an argument.

    Args:
        command: "fit", "validate" or "test", for the help.
    """
    made = ArgumentParser(
        prog=f"lirpa-ext {command}",
        description="Train with a certified loss, or certify what was trained.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="a YAML file; later files and arguments override earlier ones")
    made.add_argument("--run", type=str | None, default=None, help="folder of the run, default runs/NAME of the config")
    made.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and random slopes")
    made.add_argument("--resume", type=bool, default=True, help="go on with last.ckpt of the folder; false starts anew")
    made.add_argument("--checkpoint", type=str | None, default=None, help="of validate and test, default the best one")
    made.add_argument("--checkpoint_every", type=int, default=0, help="steps between checkpoints within an epoch")
    made.add_argument("--progress", type=bool, default=sys.stderr.isatty(), help="show progress bars")
    made.add_class_arguments(CertifiedClassifier, "model", skip={"seed"})
    made.add_subclass_arguments(
        LightningDataModule, "data", default={"class_path": "lirpa_ext.training.datamodule.ImageData"}
    )
    made.add_class_arguments(Trainer, "trainer", skip={"default_root_dir", "enable_checkpointing"}, instantiate=False)
    made.set_defaults({"trainer.num_sanity_val_steps": 0, "trainer.log_every_n_steps": 1, "trainer.max_epochs": 10})
    return made


def parse(arguments: Sequence[str], command: str = "fit") -> Namespace:
    """Parse and check types and keys.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, a file that is not there.
    """
    made = parser(command)
    try:
        config = made.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(f"{error}. `lirpa-ext {command} --help` lists the keys") from error
    if config.run is None:
        files = config.config or []
        config.run = str(Path("runs") / (Path(str(files[-1])).stem if files else "unnamed"))
    return config


def _instantiate(config: Namespace) -> Namespace:
    """Model, data, and what the trainer is made of; weights depend on the seed alone."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    seed_everything(config.seed, verbose=False)
    made = parser().instantiate_classes(config)
    made.model.seed = config.seed
    if hasattr(made.data, "seed"):
        made.data.seed = config.seed
    return made


def fit(config: Namespace) -> CertifiedClassifier:
    """Train, or go on with a run that was stopped, and write its folder.

    Args:
        config: Of `parse`.

    Returns:
        The module with the best weights after the ramp.

    Raises:
        ConfigError: The configuration cannot be run, or the folder holds another run.
        DataError: The data are missing or corrupt.
    """
    folder = Path(config.run)
    made = _instantiate(config)
    model, data = made.model, made.data
    model.schedule.check(model.eps, config.trainer.max_epochs if config.trainer.max_steps == -1 else None)
    data.prepare_data()
    data.setup("fit")
    _check_batch(model, data)
    last = folder / "last.ckpt"
    resumed = _prepare(folder, config, last)
    best = Best(folder)
    callbacks = [Metrics(folder), *(made.trainer.callbacks or []), best, Last(folder, config.checkpoint_every)]
    trainer = _trainer(made.trainer, folder, callbacks, config.progress)
    if trainer.is_global_zero:
        write_environment(trainer, config.seed, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        trainer.fit(model, datamodule=data, ckpt_path=last if resumed else None)
    if trainer.is_global_zero:
        chosen = best.path if best.path.is_file() else last
        _load_weights(model, chosen)
        save_network(model, folder)
    return model


def evaluate(config: Namespace, command: str) -> Report | EnsembleReport:
    """Certify the run's best network on the validation samples or the test split, and write the report to its folder.

    Args:
        config: Of `parse`.
        command: "validate" or "test".

    Returns:
        The report: clean, PGD and verified accuracy, in float64 with sound norms. Of a randomized network: accuracy of
        an ensemble, clean and under EOT-PGD.

    Raises:
        ConfigError: There is no checkpoint, or it is of another network.
    """
    folder = Path(config.run)
    chosen = config.checkpoint or next((p for p in (folder / "best.ckpt", folder / "last.ckpt") if p.is_file()), None)
    if chosen is None:
        raise ConfigError(f"{folder} holds neither best.ckpt nor last.ckpt: run `lirpa-ext fit`, or pass --checkpoint")
    made = _instantiate(config)
    model, data = made.model, made.data
    _load_weights(model, Path(chosen))
    data.prepare_data()
    data.setup(command)
    loader = data.test_dataloader() if command == "test" else data.val_dataloader()
    folder.mkdir(parents=True, exist_ok=True)
    report = _reported(model, loader, getattr(data, "evaluation_batch", 100), config.progress)
    report.to_json(folder / f"{command}.json")
    if all((folder / name).is_file() for name in ("config.yaml", "environment.json")):
        write_card(folder)
    return report


def _reported(model: CertifiedClassifier, loader: Any, batch_size: int, progress: bool) -> Report | EnsembleReport:
    if model.randomized:
        return ensemble_report(model, gather(loader), final=True)
    return certify(
        model.model.eval(), gather(loader), model.evaluation_eps, model.norm, model.verifier,
        options=model.verifier_options(), x_L=model.data_range[0], x_U=model.data_range[1],
        attack_steps=0 if model.norm == 1 else model.evaluation.final_attack_steps, radius=False, progress=progress,
        batch_size=batch_size,
    )  # fmt: skip


def _check_batch(model: CertifiedClassifier, data: LightningDataModule) -> None:
    """Raise ConfigError unless the images fit network and data range, and the labels its classes."""
    x, y = next(iter(data.val_dataloader()))
    shape, wanted = tuple(x.shape[1:]), tuple(model.network.input_shape)
    if shape != wanted:
        raise ConfigError(f"images have shape {shape}, model.network.input_shape is {wanted}: make them agree")
    lower, upper = model.data_range
    if lower is not None and upper is not None and not (lower <= float(x.min()) and float(x.max()) <= upper):
        raise ConfigError(
            f"pixels span [{float(x.min()):g}, {float(x.max()):g}], model.data_range is [{lower:g}, {upper:g}]"
        )
    labels = getattr(data, "train_set", None)
    top = int((y if labels is None else labels[1]).max())
    if top >= model.network.classes:
        raise ConfigError(f"there is a label {top}, and model.network.classes is {model.network.classes}")


def _prepare(folder: Path, config: Namespace, last: Path) -> bool:
    """Whether to go on with the run in this folder; else make it ready for a new one."""
    wanted = _plain(config)
    written = folder / "config.yaml"
    child = int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("RANK", 0))  # another process of the same run
    resumed = last.is_file() and config.resume
    if resumed and written.is_file():
        before = _kept(yaml.safe_load(written.read_text(encoding="utf-8")))
        with contextlib.suppress(ArgumentError):  # of a key that is no more, which is a difference
            before = _kept(_plain(parser().parse_object(before)))  # what an earlier version lacks has its default
        different = sorted(_differences(before, _kept(wanted)))
        if different:
            raise ConfigError(
                f"{folder} holds a run of another configuration; they differ in {', '.join(different)}. Choose "
                "another --run, or start anew by --resume false"
            )
    if not child:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            for name in ("last.ckpt", "best.ckpt", "metrics.csv", "test.json", "validate.json"):
                (folder / name).unlink(missing_ok=True)
        written.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    return resumed


def _plain(config: Namespace) -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load(parser().dump(config, skip_none=False))
    return plain


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _FREE}
    return kept | {"trainer": {k: v for k, v in kept["trainer"].items() if k not in _FREE_OF_TRAINER}}


def _differences(a: Any, b: Any, path: str = "") -> set[str]:
    """Dotted names of what differs."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return set() if a == b else {path}
    return {
        name
        for key in a.keys() | b.keys()
        for name in _differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
    }


def _trainer(made: Namespace, folder: Path, callbacks: list[Any], progress: bool) -> Trainer:
    options = vars(made) | {"callbacks": callbacks, "default_root_dir": folder, "enable_checkpointing": True}
    defaults = {"logger": _tensorboard(folder), "enable_progress_bar": progress, "enable_model_summary": False}
    options |= {name: value for name, value in defaults.items() if options[name] is None}
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    try:
        return Trainer(**options)
    except (
        MisconfigurationException,
        ImportError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # Lightning's own, of devices that are not there and so on
        raise ConfigError(f"trainer: {error}") from error


def _tensorboard(folder: Path) -> Any:
    """TensorBoard's logger where the package is installed; ``metrics.csv`` is written in any case."""
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ImportError:
        return False


def _load_weights(model: CertifiedClassifier, path: Path) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content["state_dict"]
    except LirpaExtError:
        raise
    except Exception as error:  # zip, pickle and torch raise whatever comes
        raise ConfigError(f"{path} is missing, truncated or no checkpoint: {type(error).__name__}: {error}") from error
    model.on_load_checkpoint(content)
    model.load_state_dict(state)
