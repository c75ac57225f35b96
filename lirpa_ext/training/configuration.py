"""Configurations of runs: parsed from YAML and arguments, written to the run's folder, and compared on resuming."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, Trainer

from ..errors import ConfigError, LirpaExtError
from ..reporting.files import write_whole
from .module import CertifiedClassifier

__all__ = ["differences", "parse", "parser", "write"]

# Keys on which the trained network does not depend, so that they may differ when a run is resumed.
_FREE = {"config", "run", "resume", "resume_lr", "checkpoint", "checkpoint_every", "progress"}
_FREE_OF_TRAINER = {
    "accelerator", "devices", "num_nodes", "strategy", "max_time", "logger", "callbacks", "enable_progress_bar",
    "enable_model_summary", "log_every_n_steps", "profiler", "num_sanity_val_steps",
}  # fmt: skip


_MOST_BYTES, _MOST_VALUES = 2**17, 10_000  # limits on a YAML file


def parser(command: str = "fit") -> ArgumentParser:
    """Make the parser of a configuration: YAML files by ``--config``, and every key as an argument.

    Args:
        command: Name of the command in the help text, default "fit".
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
    made.add_argument(
        "--resume_lr", type=float | None, default=None,
        help="learning rate to go on with, in place of optimizer.lr: after a step that gave NaN, for one",
    )  # fmt: skip
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
    """Parse a configuration, and check its types and keys.

    Args:
        arguments: Arguments of the command line, such as ``["--config", "mnist.yaml", "--seed", "1"]``.
        command: Name of the command in error messages, default "fit".

    Returns:
        The configuration, for `fit` and `evaluate` of `lirpa_ext.training.runs`.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type, or a file is missing or no YAML.
    """
    made = parser(command)
    for before, argument in itertools.pairwise(["", *arguments]):
        name, _, value = argument.partition("=")
        if before == "--config" or name == "--config":
            _check_yaml(Path(value or argument))
    try:
        config = made.parse_args(list(arguments))
    except LirpaExtError:
        raise
    except (ArgumentError, yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{error}. `lirpa-ext {command} --help` lists the keys") from error
    if config.run is None:
        files = config.config or []
        config.run = str(Path("runs") / (Path(str(files[-1])).stem if files else "unnamed"))
    if config.checkpoint_every < 0:
        raise ConfigError(f"--checkpoint_every is a number of steps, 0 for none; got {config.checkpoint_every}")
    return config


def _check_yaml(path: Path) -> None:
    """Raise ConfigError for a file that is no YAML, or that its aliases expand to an enormous size."""
    if not path.exists():
        return  # the parser reports it
    if not path.is_file():
        raise ConfigError(f"{path} is no regular file")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_BYTES} bytes: that is no configuration")
        text = path.read_text(encoding="utf-8")
        # The time of the YAML reader grows with the square of the number of lists and maps.
        if max(text.count(kind) for kind in ("[", "{", "- ")) > _MOST_VALUES // 10:
            raise ConfigError(f"{path} has more than {_MOST_VALUES // 10} lists or maps: that is no configuration")
        size = _size(yaml.compose(text, yaml.SafeLoader), {})
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if isinstance(error, LirpaExtError):
            raise
        raise ConfigError(f"{path} is no YAML: {error or type(error).__name__}") from error
    if size > _MOST_VALUES:
        raise ConfigError(f"{path} has more than {_MOST_VALUES} values, by its aliases: that is no configuration")


def _size(node: Any, known: dict[int, int]) -> int:
    """Number of values in a node; a value that aliases repeat counts each time."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # for a node that contains itself
        parts = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def write(config: Namespace, folder: Path) -> None:
    """Write ``config.yaml``, with all defaults, into the folder of a run.

    Raises:
        ResultsError: The file cannot be written.
    """
    write_whole(folder / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))


def differences(config: Namespace, folder: Path, length: bool = False) -> list[str]:
    """Keys in which a configuration differs from the ``config.yaml`` of a run, as far as results depend on them.

    Args:
        config: Configuration of `parse`.
        folder: Folder of the run; without ``config.yaml`` nothing differs.
        length: Whether ``trainer.max_epochs`` is compared, default False, which allows a run to be extended.

    Returns:
        Dotted names such as ``model.eps``, sorted.

    Raises:
        ConfigError: ``config.yaml`` cannot be read.
    """
    written = folder / "config.yaml"
    if not written.is_file():
        return []
    try:
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
        before = _kept(before, length)
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{written} is no configuration of a run: {error}. Start anew by --resume false") from error
    with contextlib.suppress(ArgumentError):  # a key that no longer exists stays, and is a difference
        before = _kept(_plain(parser().parse_object(before)), length)  # keys that are newer than the file get defaults
    return sorted(_differences(before, _kept(_plain(config), length)))


def _plain(config: Namespace) -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load(parser().dump(config, skip_none=False))
    return plain


def _kept(config: dict[str, Any], length: bool) -> dict[str, Any]:
    free = _FREE_OF_TRAINER if length else _FREE_OF_TRAINER | {"max_epochs"}
    kept = {key: value for key, value in config.items() if key not in _FREE}
    return kept | {"trainer": {k: v for k, v in kept["trainer"].items() if k not in free}}


def _differences(a: Any, b: Any, path: str = "") -> set[str]:
    """Dotted names of the values that differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return set() if a == b else {path}
    return {
        name
        for key in a.keys() | b.keys()
        for name in _differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
    }
