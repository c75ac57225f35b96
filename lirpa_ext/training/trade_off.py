"""Clean against robust accuracy of the runs of a sweep: table and plot (Fig. B.4 of S. Lee, 2021)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ResultsError
from ..reporting.plots import style
from ..reporting.results import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TradeOff", "plot_trade_off", "read_trade_off"]


@dataclass(frozen=True)
class TradeOff(Result):
    """Standard and robust accuracy of the runs of a sweep.

    Attributes:
        runs: One dict for each run, as `lirpa_ext.training.sweep.sweep` returns them: loss, eps (of training), seed,
            samples, run; clean, pgd (None without an attack) and verified (None for a randomized network), as
            fractions.
    """

    runs: list[Row]

    def rows(self) -> list[Row]:
        """One row for each run, accuracies in percent."""
        return [
            {key: row[key] for key in ("loss", "eps", "seed", "samples", "run")}
            | {f"{key} %": None if row[key] is None else 100 * row[key] for key in ("clean", "pgd", "verified")}
            for row in self.runs
        ]

    def losses(self) -> list[str]:
        """Names of the losses, without repetition."""
        return list(dict.fromkeys(row["loss"] for row in self.runs))

    def summary(self) -> str:
        """The run with the highest verified accuracy (PGD for randomized networks) of each loss, in words."""
        best = [max((r for r in self.runs if r["loss"] == loss), key=_lowest) for loss in self.losses()]
        told = "; ".join(
            f"{row['loss']} trained at eps {row['eps']}: {100 * row['clean']:.1f}% clean, "
            f"{100 * _lowest(row):.1f}% {'under PGD' if row['verified'] is None else 'verified'}"
            for row in best
        )
        return f"Standard against robust accuracy of {len(self.runs)} runs. Most verified of each loss: {told}."


def read_trade_off(folder: str | Path) -> TradeOff:
    """Read the results of a sweep.

    Args:
        folder: Folder into which ``lirpa-ext sweep`` wrote ``sweep.csv``.

    Raises:
        ResultsError: The file is missing, or no table of a sweep.
    """
    path = Path(folder) / "sweep.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            runs: list[Row] = [dict(row) for row in csv.DictReader(file)]
        for row in runs:
            row |= {key: float(row[key]) if row[key] else None for key in ("clean", "pgd", "verified")}
            row |= {key: int(row[key]) for key in ("seed", "samples")}
        if not runs:
            raise ValueError("it has no run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path} is no table of a sweep: {error}. `lirpa-ext sweep --out {folder}` writes it"
        ) from error
    return TradeOff(runs)


def _lowest(row: Row) -> float:
    """Verified accuracy of a run; PGD accuracy for a randomized network, of which nothing is verified."""
    return float(row["pgd"] if row["verified"] is None else row["verified"])


def plot_trade_off(result: TradeOff, axes: Axes) -> None:
    """Plot verified against standard accuracy, with a segment up to the PGD accuracy; one line for each loss.

    Fig. B.4 of Lee (2021). For a randomized network, of which nothing is verified, the PGD accuracy is plotted.

    Args:
        result: The runs.
        axes: Axes to draw on.
    """
    for number, loss in enumerate(result.losses()):
        chosen = sorted((row for row in result.runs if row["loss"] == loss), key=lambda row: row["clean"])
        shown = style(number) | {"linestyle": ":"}
        axes.plot([100 * r["clean"] for r in chosen], [100 * _lowest(r) for r in chosen], label=loss, **shown)
        for row in chosen:
            if row["pgd"] is not None and row["verified"] is not None:
                axes.plot([100 * row["clean"]] * 2, [100 * row["verified"], 100 * row["pgd"]], color=shown["color"])
    axes.set(xlabel="standard accuracy, %", ylabel="robust accuracy, %: from verified to PGD")
    axes.legend(fontsize="small")
