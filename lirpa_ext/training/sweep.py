"""A sweep: one configuration at several eps, losses and seeds, each a run of its own that resumes, in one table.

The plot is that of Fig. B.4 of the source: standard accuracy against the interval from verified to PGD accuracy.
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
    """What varies; an empty part keeps the value of the configuration.

    Attributes:
        eps: Radii to train at; evaluation keeps the configuration's own.
        losses: Names of losses.
        seeds: Seeds.
    """

    eps: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()

    def points(self) -> list[dict[str, str]]:
        """One dict of configuration keys and values for each run."""
        unknown = [name for name in self.losses if name not in OBJECTIVES]
        if unknown:
            raise ConfigError(f"unknown loss {unknown[0]!r}: known are {', '.join(OBJECTIVES)}")
        axes = {"model.loss.name": self.losses, "model.eps": self.eps, "seed": self.seeds}
        named = {key: values for key, values in axes.items() if values}
        if not named:
            raise ConfigError("a sweep varies something: pass --eps, --losses or --seeds")
        return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


def sweep(arguments: Sequence[str], grid: Grid, folder: Path) -> list[dict[str, Any]]:
    """Fit and test every point of the grid, and write ``sweep.csv`` and ``sweep.png`` after each.

    A point that is finished and tested, by this configuration, is taken as it is; one that was killed goes on.

    Args:
        arguments: Of `lirpa_ext.training.runs.parse`, those that all runs share.
        grid: What varies.
        folder: Each run gets a folder inside of it.

    Returns:
        One row for each run: `COLUMNS`, accuracies as fractions.

    Raises:
        ConfigError: The configuration cannot be run; the first run's, before it starts.
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
    """The rows as text, accuracies in percent."""
    lines = [f"{'loss':<14} {'eps':>10} {'seed':>5} {'clean %':>8} {'PGD %':>8} {'verified %':>10}"]
    for row in rows:
        pgd, verified = ("-" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("pgd", "verified"))
        lines.append(
            f"{row['loss']:<14} {row['eps']!s:>10} {row['seed']:>5} {100 * row['clean']:>8.2f} {pgd:>8} {verified:>10}"
        )
    return "\n".join(lines)


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Standard accuracy against verified accuracy, with a segment up to PGD's, one line a loss.

    Of a randomized network, of which nothing is verified, PGD's alone.
    """
    from ..reporting.plots import figure, save
    from .trade_off import TradeOff, plot_trade_off

    result = TradeOff(rows)
    drawn, axes = figure(result.summary())
    plot_trade_off(result, axes[0, 0])
    save(drawn, path)
