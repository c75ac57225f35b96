"""A sweep: one configuration trained at several eps, losses and seeds, with the results in one table.

Each point is a run of its own, which can be resumed. The plot is that of Fig. B.4 of Lee (2021): standard accuracy
against the interval from verified to PGD accuracy.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..reporting.files import write_csv
from .objectives import OBJECTIVES

__all__ = ["Grid", "plot_sweep", "sweep"]

COLUMNS = ("loss", "eps", "seed", "samples", "clean", "pgd", "verified", "run")


@dataclass(frozen=True)
class Grid:
    """The values that a sweep varies; an empty tuple keeps the value of the configuration.

    Attributes:
        eps: Radii to train at; the evaluation keeps the radius of the configuration.
        losses: Names of losses.
        seeds: Seeds.
    """

    eps: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()

    def points(self) -> list[dict[str, str]]:
        """One dict of configuration keys and values for each run.

        Raises:
            ConfigError: A loss is unknown, or nothing varies.
        """
        unknown = [name for name in self.losses if name not in OBJECTIVES]
        if unknown:
            raise ConfigError(f"unknown loss {unknown[0]!r}: known are {', '.join(OBJECTIVES)}")
        axes = {"model.loss.name": self.losses, "model.eps": self.eps, "seed": self.seeds}
        named = {key: values for key, values in axes.items() if values}
        if not named:
            raise ConfigError("a sweep varies something: pass --eps, --losses or --seeds")
        return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


def sweep(arguments: Sequence[str], grid: Grid, folder: Path) -> list[dict[str, Any]]:
    """Train and test a network at every point of the grid, and write ``sweep.csv`` and ``sweep.png`` after each.

    A run that was finished and tested with the same configuration is not repeated; one that was killed is resumed.

    Args:
        arguments: Arguments of `lirpa_ext.training.runs.parse` that all runs share.
        grid: The values that vary.
        folder: Folder of the sweep, in which each run gets its own.

    Returns:
        One dict for each run with the keys `COLUMNS`; accuracies are fractions.

    Raises:
        ConfigError: The grid or a configuration is wrong; keys and types are checked before the first run starts.
        DataError, ResultsError: As `lirpa_ext.training.runs.fit`.
    """
    from .runs import evaluate, fit, is_tested, parse

    points = grid.points()
    common = parse(arguments, "sweep")
    evaluated = common.model.eps if common.model.evaluation.eps is None else common.model.evaluation.eps
    configs = []
    for point in points:
        name = "_".join(value.replace("/", "-") for value in point.values())
        changes = point | {"model.evaluation.eps": str(evaluated), "run": str(folder / name)}
        given = [text for key, value in changes.items() for text in (f"--{key}", value)]
        configs.append(parse([*arguments, *given], "sweep"))
    rows: list[dict[str, Any]] = []
    for config in configs:
        run = Path(config.run)
        if not is_tested(config):
            fit(config)
            evaluate(config, "test")
        report = json.loads((run / "test.json").read_text(encoding="utf-8"))
        (summary,) = report["summary"]
        rows.append(
            {"loss": config.model.loss.name, "eps": config.model.eps, "seed": config.seed}
            | {"samples": report["meta"]["samples"], "run": run.name}
            | {key: summary[key] for key in ("clean", "pgd", "verified")}
        )
        write_csv(folder / "sweep.csv", COLUMNS, rows)
        plot_sweep(rows, folder / "sweep.png")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `sweep` as a text table, accuracies in percent."""
    lines = [f"{'loss':<14} {'eps':>10} {'seed':>5} {'clean %':>8} {'PGD %':>8} {'verified %':>10}"]
    for row in rows:
        pgd, verified = ("-" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("pgd", "verified"))
        lines.append(
            f"{row['loss']:<14} {row['eps']!s:>10} {row['seed']:>5} {100 * row['clean']:>8.2f} {pgd:>8} {verified:>10}"
        )
    return "\n".join(lines)


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the plot of a sweep, see `lirpa_ext.training.trade_off.plot_trade_off`.

    Args:
        rows: Rows of `sweep`.
        path: PNG, SVG or PDF file to write.

    Raises:
        ResultsError: The file cannot be written.
    """
    from ..reporting.plots import figure, save
    from .trade_off import TradeOff, plot_trade_off

    result = TradeOff(rows)
    drawn, axes = figure(result.summary())
    plot_trade_off(result, axes[0, 0])
    save(drawn, path)
