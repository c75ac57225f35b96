"""The task of ``lirpa-ext analyze`` and ``study``: models or folders of runs, data and ball; the table of analyses.

A folder of ``lirpa-ext fit`` provides its network, and norm, eps, data and data range unless the command gives them.
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

from ..data import Pair, load_data, names_a_function
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
    """An analysis of the command line, ``lirpa-ext analyze NAME`` or ``lirpa-ext study NAME``.

    Attributes:
        run: Function of a `Task` that returns numbers and figure.
        help: Help text of one line.
        add_arguments: Function that adds the analysis's own arguments to its parser; default none.
        of_folders: Whether the analysis only reads files in folders, default False: it takes models, data, a ball and
            methods.
    """

    run: Callable[[Task], tuple[Result, Figure]]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)
    of_folders: bool = False


ANALYSES: dict[str, Analysis] = {}


def register_analysis(name: str, analysis: Analysis, overwrite: bool = False) -> None:
    """Add an analysis to ``lirpa-ext analyze``.

    Args:
        name: Name of the subcommand.
        analysis: The analysis.
        overwrite: Whether to replace an analysis of this name, default False.

    Raises:
        RegistrationError: The name is taken.
    """
    add(ANALYSES, "analysis", name, analysis, overwrite)


class Task:
    """Targets and settings of a command, which are read on first use.

    Args:
        arguments: Parsed arguments of the command line.

    Attributes:
        arguments: The parsed arguments, for the analysis's own ones.
        targets: Unique name -> model file or folder of a run.

    Raises:
        DataError: A target does not exist.
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
        """Target -> content of its ``config.yaml``, or {} for a model file.

        Raises:
            DataError: A folder has no readable ``config.yaml``.
        """
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
        """A setting in the configuration of the first target, or `default` if there is none."""
        value: Any = next(iter(self.configs.values()))
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Target -> its network, preceded by normalization, scale and layout of the command."""
        shape = self.data[0].shape[1:]
        files = {name: path / "model.pt" if path.is_dir() else path for name, path in self.targets.items()}
        return {name: prepare(read_model(path, self.arguments), shape, self.arguments) for name, path in files.items()}

    @property
    def model(self) -> nn.Module:
        """The network of a command with one target.

        Raises:
            OptionError: There are several targets.
        """
        if len(self.targets) > 1:
            raise OptionError(f"this analysis takes one model, got {len(self.targets)}")
        return next(iter(self.models.values()))

    @cached_property
    def data(self) -> Pair:
        """Images, (N, ...), and labels, (N,), of the command, or else of the first run.

        Raises:
            OptionError: Neither the command nor a run names the data.
            DataError: The data cannot be read.
        """
        source = self.arguments.data or self._of_the_run("data", "init_args", "source")
        if source is None:
            raise OptionError("pass --data: only the folder of a run says itself which data it is for")
        if not self.arguments.data and names_a_function(str(source)) and not self.arguments.trust:
            raise OptionError(f"the run takes its data from {source[:200]!r}, which is code: pass --data or --trust")
        return load_data(source, self.arguments.split, self.arguments.limit)

    @property
    def sample(self) -> Pair:
        """Image, (...), and label, 0-dim, of the sample that ``--sample`` names.

        Raises:
            OptionError: There is no sample of this number.
        """
        (x, y), index = self.data, self.arguments.sample
        if not 0 <= index < len(x):
            raise OptionError(f"--sample {index} is none of the {len(x)} samples")
        return x[index], y[index]

    @cached_property
    def norm(self) -> float:
        """p of the ball: of the command, or else of the first run, or else 2."""
        given = self.arguments.norm
        return float(self._of_the_run("model", "norm", default=2) if given is None else given)

    def target_eps(self) -> dict[str, float]:
        """Name -> radius at which a run was trained, for targets that are runs."""
        return {name: number(c["model"]["eps"], "model.eps") for name, c in self.configs.items() if "model" in c}

    @cached_property
    def levels(self) -> list[float]:
        """Every eps of the command, or else that of the first run.

        Raises:
            OptionError: Neither the command nor a run gives an eps.
        """
        if self.arguments.eps:
            return list(self.arguments.eps)
        trained = self._of_the_run("model", "eps")
        if not trained:
            raise OptionError("pass --eps: only the folder of a run says itself at which radius to look")
        return [number(trained, "model.eps")]

    @property
    def eps(self) -> float:
        """The eps of an analysis that takes a single one.

        Raises:
            OptionError: There are several.
        """
        if len(self.levels) > 1:
            raise OptionError(f"this analysis takes one --eps, got {len(self.levels)}")
        return self.levels[0]

    @cached_property
    def ball(self) -> dict[str, Any]:
        """Keyword arguments ``norm``, ``x_L`` and ``x_U`` of the analyses.

        Raises:
            DataError: The data range does not have two ends.
        """
        given = self.arguments.data_range
        ends = self._of_the_run("model", "data_range", default=[0.0, 1.0]) if given is None else given
        if len(ends) not in (0, 2):
            raise DataError(f"--data-range takes LO,HI or none, got {ends}")
        x_L, x_U = ends or (None, None)
        return {"norm": self.norm, "x_L": x_L, "x_U": x_U}

    @cached_property
    def methods(self) -> dict[str, Any]:
        """Keyword arguments ``options`` and, if the command gives methods, ``methods`` of the analyses.

        Raises:
            OptionError: An option is not METHOD.KEY=VALUE.
        """
        options: dict[str, dict[str, Any]] = {}
        for key, value in options_of(self.arguments.option).items():
            method, dot, name = key.rpartition(".")
            if not dot:
                raise OptionError(f"--option takes METHOD.KEY=VALUE, such as bcp.tighten=False, got {key!r}")
            options.setdefault(method, {})[name] = value
        return {"options": options} | ({"methods": self.arguments.methods} if self.arguments.methods else {})
