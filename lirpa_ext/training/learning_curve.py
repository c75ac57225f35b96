"""``metrics.csv`` of a run as rows and as a plot. Needs no Lightning."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ResultsError
from ..reporting.plots import COLORS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_metrics", "read_metrics"]

_ACCURACIES = (
    ("val_clean", "clean", {"color": COLORS["black"], "linestyle": ":"}),
    ("val_pgd", "PGD", {"color": COLORS["vermillion"], "linestyle": "--"}),
    ("val_verified", "verified", {"color": COLORS["blue"], "linestyle": "-"}),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.csv`` of a run.

    Args:
        path: The file.

    Returns:
        One dict for each epoch: column -> float or bool; empty cells are left out.

    Raises:
        ResultsError: The file cannot be read, or holds something else.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(file)]
        if any("epoch" not in row for row in rows):
            raise ValueError("a row has no epoch")
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        raise ResultsError(f"{path} holds no metrics of a run: {error}. `lirpa-ext fit` writes it anew") from error
    return rows


def _value(text: str) -> Any:
    return text == "True" if text in ("True", "False") else float(text)


def plot_metrics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot the training loss and eps (upper axes) and the validation accuracies (lower axes) over the epochs.

    Args:
        rows: Rows of `read_metrics`; a row may lack any key but ``epoch``.

    Returns:
        The figure, with an alt text.
    """
    last = rows[-1] if rows else {}
    told = ", ".join(f"{label} {100 * last[key]:.1f}%" for key, label, _ in _ACCURACIES if key in last)
    drawn, axes = figure(
        f"Learning curve over {len(rows)} epochs: training loss and eps above, accuracies on the validation samples "
        f"below{'; in the last epoch ' + told if told else ''}.",
        rows=2, sharex=True,
    )  # fmt: skip
    upper, lower = axes[:, 0]
    epochs = [row["epoch"] + 1 for row in rows]
    upper.plot(epochs, [row.get("loss") for row in rows], color=COLORS["black"], label="loss")
    upper.set(ylabel="training loss")
    right = upper.twinx()
    right.plot(epochs, [row.get("eps") for row in rows], color=COLORS["orange"], linestyle="--", label="eps")
    right.set(ylabel="eps at the epoch's last step", ylim=(0, None))
    handles = [*upper.lines, *right.lines]
    right.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    for key, label, look in _ACCURACIES:
        points = [(row["epoch"] + 1, 100 * row[key]) for row in rows if key in row]
        if points:
            lower.plot(*zip(*points, strict=True), label=label, **look)
    lower.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 101))
    if lower.has_data():
        lower.legend()
    return drawn
