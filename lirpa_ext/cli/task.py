"""What ``lirpa-ext analyze`` is asked: models or folders of runs, data and sets, and the table of analyses.

A folder of `lirpa-ext fit` brings its network, and its norm, eps, data and data range unless the command says others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from ..data import Pair, load_data
from ..errors import DataError, OptionError
from ..extensions import add
from ..reporting.results import Result
from ..training.schedules import number
from .certify import options_of, prepare, read_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ANALYSES", "Analysis", "Task", "register_analysis"]


@dataclass(frozen=True)
class Analysis:
    """An entry of the table: ``lirpa-ext analyze NAME``.

    Attributes:
        run: `Task` -> numbers and figure.
        help: One line.
        add_arguments: Adds the analysis's own arguments, default none.
        of_folders: Whether it reads what is in folders alone; else it takes models, data, a ball and methods.
    """

    run: Callable[[Task], tuple[Result, Figure]]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)
    of_folders: bool = False


ANALYSES: dict[str, Analysis] = {}


def register_analysis(name: str, analysis: Analysis, overwrite: bool = False) -> None:
    """Add an analysis to ``lirpa-ext analyze``.

    Args:
        name: Of the sub-command.
        analysis: What it does.
        overwrite: Replace one that exists.

    Raises:
        RegistrationError: The name is taken.
    """
    add(ANALYSES, "analysis", name, analysis, overwrite)


class Task:
    """The command's targets and settings, read when first asked for.

    Args:
        arguments: Of the command line.

    Attributes:
        arguments: The same, for what is an analysis's own.
        targets: Files of models and folders of runs, by a name that tells them apart.

    Raises:
        DataError: A target is not there.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        paths = [Path(target) for target in arguments.targets]
        for path in paths:
            if not path.exists():
                raise DataError(f"there is no {path}: give the folder of a run, or a model file")
        short = [path.name if path.is_dir() else path.stem for path in paths]
        self.targets = {
            name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)
        }

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """``config.yaml`` of each target that is a run's folder, {} for a file."""
        found: dict[str, dict[str, Any]] = {}
        for name, path in self.targets.items():
            found[name] = {}
            if path.is_dir():
                try:
                    found[name] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
                except (OSError, ValueError, yaml.YAMLError) as error:
                    raise DataError(
                        f"{path} is no folder of a run: {error}. `lirpa-ext fit --run` writes one"
                    ) from error
        return found

    def _of_the_run(self, *keys: str, default: Any = None) -> Any:
        """A setting of the first target's run, `default` where it has none."""
        value: Any = next(iter(self.configs.values()))
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """The networks by name, with normalization, scale and layout of the command inside."""
        shape = self.data[0].shape[1:]
        files = {name: path / "model.pt" if path.is_dir() else path for name, path in self.targets.items()}
        return {name: prepare(read_model(path, self.arguments), shape, self.arguments) for name, path in files.items()}

    @property
    def model(self) -> nn.Module:
        """The one network.

        Raises:
            OptionError: There are several.
        """
        if len(self.targets) > 1:
            raise OptionError(f"this analysis takes one model, got {len(self.targets)}")
        return next(iter(self.models.values()))

    @cached_property
    def data(self) -> Pair:
        """Images and labels.

        Raises:
            OptionError: Neither the command nor a run's folder says which.
        """
        source = self.arguments.data or self._of_the_run("data", "init_args", "source")
        if source is None:
            raise OptionError("pass --data: only the folder of a run says itself which data it is for")
        return load_data(source, self.arguments.split, self.arguments.limit)

    @property
    def sample(self) -> Pair:
        """Image (...) and label, 0-dim, of ``--sample``.

        Raises:
            OptionError: There is none of this number.
        """
        (x, y), index = self.data, self.arguments.sample
        if not 0 <= index < len(x):
            raise OptionError(f"--sample {index} is none of the {len(x)} samples")
        return x[index], y[index]

    @cached_property
    def norm(self) -> float:
        """p of the ball: of the command, else of the run, else 2."""
        given = self.arguments.norm
        return float(self._of_the_run("model", "norm", default=2) if given is None else given)

    def target_eps(self) -> dict[str, float]:
        """Radius that each run was trained at."""
        return {name: number(c["model"]["eps"], "model.eps") for name, c in self.configs.items() if "model" in c}

    @cached_property
    def levels(self) -> list[float]:
        """Every eps: of the command, else that of the run.

        Raises:
            OptionError: Neither says one.
        """
        if self.arguments.eps:
            return list(self.arguments.eps)
        trained = self._of_the_run("model", "eps")
        if not trained:
            raise OptionError("pass --eps: only the folder of a run says itself at which radius to look")
        return [number(trained, "model.eps")]

    @property
    def eps(self) -> float:
        """The one eps.

        Raises:
            OptionError: There are several.
        """
        if len(self.levels) > 1:
            raise OptionError(f"this analysis takes one --eps, got {len(self.levels)}")
        return self.levels[0]

    @cached_property
    def ball(self) -> dict[str, Any]:
        """norm, x_L and x_U, as the analyses take them."""
        given = self.arguments.data_range
        ends = self._of_the_run("model", "data_range", default=[0.0, 1.0]) if given is None else given
        if len(ends) not in (0, 2):
            raise DataError(f"--data-range takes LO,HI or none, got {ends}")
        x_L, x_U = ends or (None, None)
        return {"norm": self.norm, "x_L": x_L, "x_U": x_U}

    @cached_property
    def methods(self) -> dict[str, Any]:
        """options and, if the command says any, methods, as the analyses take them.

        Raises:
            OptionError: An option that is not METHOD.KEY=VALUE.
        """
        options: dict[str, dict[str, Any]] = {}
        for key, value in options_of(self.arguments.option).items():
            method, dot, name = key.rpartition(".")
            if not dot:
                raise OptionError(f"--option takes METHOD.KEY=VALUE, such as bcp.tighten=False, got {key!r}")
            options.setdefault(method, {})[name] = value
        return {"options": options} | ({"methods": self.arguments.methods} if self.arguments.methods else {})
