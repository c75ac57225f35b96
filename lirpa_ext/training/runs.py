"""A run from its configuration: train or resume, and certify the trained network. ``lirpa-ext fit`` calls this."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..certification.certify import certify
from ..certification.report import Report
from ..data import gather
from ..errors import ConfigError, DataError
from ..reporting.files import locked, make_folder, remove_parts, unwritable
from .batches import resumable
from .card import write_card
from .checkpoints import Best, Checkpoints, Last, State, read_checkpoint
from .configuration import differences, parse, parser, write
from .module import CertifiedClassifier
from .randomized import EnsembleReport, ensemble_report
from .run_folder import Metrics, save_network, write_environment

__all__ = ["evaluate", "fit", "is_tested", "parse", "parser"]

_FILES = ("last.ckpt", "best.ckpt", "metrics.csv", "model.pt", "model.onnx", "test.json", "validate.json", "README.md")


def _instantiate(config: Namespace) -> Namespace:
    """Make module and data, and the trainer's arguments; the initial weights depend on the seed alone."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    seed_everything(config.seed, verbose=False)
    made = parser().instantiate_classes(config)
    made.model.seed = config.seed
    if hasattr(made.data, "seed"):
        made.data.seed = config.seed
    return made


def fit(config: Namespace) -> CertifiedClassifier:
    """Train a network, or resume a run that was stopped, and write the folder of the run.

    Args:
        config: Configuration of `parse`.

    Returns:
        The module with the best weights after the ramp; the last weights if no epoch was judged.

    Raises:
        ConfigError: The configuration cannot be run, the folder holds another run or its checkpoint is corrupt, or a
            step gave a loss or weights that are not finite.
        DataError: The data are missing or corrupt.
        ResultsError: The folder cannot be written, or another process trains in it.
    """
    folder = Path(config.run)
    if _is_child():  # the first process of this run holds the lock
        return _fit(config, folder)
    make_folder(folder)
    with locked(folder / "run"):
        remove_parts(folder)
        return _fit(config, folder)


def _fit(config: Namespace, folder: Path) -> CertifiedClassifier:
    made = _instantiate(config)
    model, data = made.model, made.data
    model.schedule.check(model.eps, config.trainer.max_epochs if config.trainer.max_steps == -1 else None)
    data.prepare_data()
    data.setup("fit")
    _check_batch(model, data)
    state = _state(config, folder, model)
    finished = state is not None and state.finished(config.trainer.max_epochs, config.trainer.max_steps)
    model.resume_lr = config.resume_lr
    best = Best(folder)
    callbacks = [Metrics(folder), *(made.trainer.callbacks or []), best, Last(folder, config.checkpoint_every)]
    trainer = _trainer(made.trainer, folder, callbacks, config.progress)
    model.check_trainer(trainer, config.trainer.sync_batchnorm)
    if trainer.is_global_zero:
        _clear(folder, ["test.json", "validate.json"] if state else _FILES, keep=finished)
        write(config, folder)
        write_environment(trainer, config.seed, model.rates if state is None else state.rates, folder)
    if not finished:
        _train(trainer, model, data, config, state)
    if trainer.is_global_zero:
        state = State.read(folder)
        if state is None:
            raise ConfigError(f"{folder} has no checkpoint: not one step was trained; see trainer's limits")
        chosen = best.path if best.path.is_file() else state.path
        _load_weights(model.float() if trainer.precision == "64-true" else model, chosen)
        write_environment(trainer, config.seed, state.rates, folder)
        save_network(model, folder)
    return model


def _train(trainer: Trainer, model: CertifiedClassifier, data: Any, config: Namespace, state: State | None) -> None:
    if trainer.world_size == 1 and not config.trainer.overfit_batches:
        loader = data.train_dataloader
        data.train_dataloader = lambda: resumable(loader(), config.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        try:
            trainer.fit(model, datamodule=data, ckpt_path=None if state is None else state.path, weights_only=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
                raise unwritable(trainer.default_root_dir, error) from error
            raise DataError(f"a file or folder that the training needs cannot be read: {error}") from error


def is_tested(config: Namespace) -> bool:
    """Whether the run of this configuration is finished and its ``test.json`` exists.

    Args:
        config: Configuration of `parse`.

    Raises:
        ConfigError: A file in the folder cannot be read.
    """
    folder = Path(config.run)
    if not (folder / "test.json").is_file() or differences(config, folder, length=True):
        return False
    state = State.read(folder)
    return state is not None and state.finished(config.trainer.max_epochs, config.trainer.max_steps)


def evaluate(config: Namespace, command: str) -> Report | EnsembleReport:
    """Certify the best network of a run on the validation samples or the test split, and write the report.

    Args:
        config: Configuration of `parse`.
        command: "validate" or "test"; the report is written to ``validate.json`` or ``test.json``.

    Returns:
        The report: clean, PGD and verified accuracy, in float64 with sound norms. For a randomized network, the
        accuracy of an ensemble, clean and under EOT-PGD.

    Raises:
        ConfigError: There is no checkpoint, or it is of another network.
        DataError: The data are missing or corrupt.
        ResultsError: The report cannot be written.
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
    make_folder(folder)
    report = _reported(model, loader, getattr(data, "evaluation_batch", 100), config.progress)
    report.to_json(folder / f"{command}.json")
    if all((folder / name).is_file() for name in ("config.yaml", "environment.json")):
        write_card(folder)
    return report


def _reported(model: CertifiedClassifier, loader: Any, batch_size: int, progress: bool) -> Report | EnsembleReport:
    if model.randomized:
        return ensemble_report(model, gather(loader), final=True)
    attack = model.attack(model.evaluation.final_attack_steps)
    return certify(
        model.model.eval(), gather(loader), model.evaluation_eps, model.norm, model.verifier,
        options=model.verifier_options(), x_L=model.data_range[0], x_U=model.data_range[1],
        attack=attack, radius=False, progress=progress, batch_size=batch_size,
    )  # fmt: skip


def _check_batch(model: CertifiedClassifier, data: LightningDataModule) -> None:
    """Raise ConfigError unless the images fit the network and the data range, and the labels its classes."""
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


def _is_child() -> bool:
    return bool(int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("RANK", 0)))


def _state(config: Namespace, folder: Path, model: CertifiedClassifier) -> State | None:
    """The state from which to resume; None for a run that starts anew.

    Raises:
        ConfigError: The folder holds another run, its checkpoints are corrupt, or ``--resume_lr`` has no checkpoint.
    """
    state = State.read(folder) if config.resume else None
    if state is None:
        if config.resume_lr is not None:
            raise ConfigError(f"{folder} has no last.ckpt to go on from with --resume_lr: set model.optimizer.lr")
        return None
    different = differences(config, folder)
    if different:
        raise ConfigError(
            f"{folder} holds a run of another configuration; they differ in {', '.join(different)}. Choose "
            "another --run, or start anew by --resume false"
        )
    model.check_checkpoint(state.content)
    return state


def _clear(folder: Path, names: Sequence[str], keep: bool) -> None:
    """Remove files of an earlier training, which would not describe the new network."""
    try:
        for name in () if keep else names:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def _trainer(made: Namespace, folder: Path, callbacks: list[Any], progress: bool) -> Trainer:
    options = vars(made) | {"callbacks": callbacks, "default_root_dir": folder, "enable_checkpointing": True}
    plugins = options["plugins"] if isinstance(options["plugins"], list) else [options["plugins"]]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        options["plugins"] = [*filter(None, plugins), Checkpoints()]
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
    """TensorBoard's logger, or False if the package is not installed; ``metrics.csv`` is written in any case."""
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ImportError:
        return False


def _load_weights(model: CertifiedClassifier, path: Path) -> None:
    content = read_checkpoint(path)
    model.on_load_checkpoint(content)
    try:
        model.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} does not fit the network: {error}") from error
