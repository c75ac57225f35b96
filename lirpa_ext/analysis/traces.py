"""Measures of the layers during training: Lipschitz constants, ReLU activity and lower slopes.

Fig. B.1, B.2, 3.11 and C.6 to C.8 of S. Lee's dissertation (2021). The callbacks of `lirpa_ext.analysis.callbacks`
record them in the folder of a run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..certification.lipschitz import lipschitz
from ..errors import InvalidInputError, ResultsError
from ..reporting.plots import figure, style
from ..reporting.results import Result, Row, read_result
from .activity import STATES, relu_activity
from .lower_slopes import lower_slopes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ActivityTrace", "LipschitzTrace", "Trace", "activity_record", "lipschitz_records"]

Own = TypeVar("Own", bound="Trace")

PRODUCT, BEFORE_LAST = "all layers", "all but the last"


@dataclass(frozen=True)
class Trace(Result):
    """Records of the epochs of one run or several. A subclass names the files and the panels of the plot.

    Attributes:
        records: One dict for each record, with ``run``, ``epoch`` (0 before training), ``step`` and ``eps`` (radius at
            that step), and the measures.
        NAME: Name of the files in the folder of a run.
        CALLBACK: Callback that writes the files, for messages.
        PANELS: Quantities that can be plotted, name -> label of the axis.
    """

    records: tuple[Row, ...]

    NAME: ClassVar[str]
    CALLBACK: ClassVar[str]
    PANELS: ClassVar[dict[str, str]]

    def rows(self) -> list[Row]:
        """The records."""
        return list(self.records)

    def runs(self) -> list[str]:
        """Names of the runs, without repetition."""
        return list(dict.fromkeys(row["run"] for row in self.records))

    @abstractmethod
    def values(self, run: str, panel: str) -> list[tuple[int, float]]:
        """Pairs (epoch, value) of a run, for a key of `PANELS`."""

    @classmethod
    def read(cls: type[Own], folders: Mapping[str, str | Path]) -> Own:
        """Read the traces of several runs into one.

        Args:
            folders: Name of a run in the result -> folder of the run.

        Raises:
            ResultsError: A folder has no trace of this class.
        """
        records: list[Row] = []
        for name, folder in folders.items():
            path = Path(folder) / f"{cls.NAME}.json"
            content = read_result(path) if path.is_file() else None
            if content is None or content["analysis"] != cls.__name__:
                raise ResultsError(f"{path} is no {cls.__name__}: train with {cls.CALLBACK} among trainer.callbacks")
            records += [row | {"run": name} for row in content["rows"]]
        return cls(tuple(records))

    def plot(self, axes: Axes, panel: str | None = None) -> None:
        """Plot a quantity over the epochs, one line for each run, with vertical lines where eps reaches its maximum.

        Args:
            axes: Axes to draw on.
            panel: A key of `PANELS`, default the first.

        Raises:
            InvalidInputError: The panel is unknown.
        """
        panel = next(iter(self.PANELS)) if panel is None else panel
        if panel not in self.PANELS:
            raise InvalidInputError(f"there is no panel {panel!r}; there are {', '.join(self.PANELS)}")
        for number, run in enumerate(self.runs()):
            values = self.values(run, panel)
            if values:
                axes.plot(*zip(*values, strict=True), label=run, **style(number))
        for epoch in {self.ramp_end(run) for run in self.runs()}:
            if epoch is not None:
                axes.axvline(epoch, color="#888888", linewidth=1, linestyle=":")
        axes.set(xlabel="epoch", ylabel=self.PANELS[panel])
        if axes.has_data() and len(self.runs()) > 1:
            axes.legend(fontsize="small")

    def figure(self) -> Figure:
        """Plot all panels, one below the other; the figure has an alt text."""
        drawn, axes = figure(self.summary(), rows=len(self.PANELS), sharex=True)
        for ax, panel in zip(axes.flat, self.PANELS, strict=True):
            self.plot(ax, panel)
            ax.label_outer()
        return drawn

    def ramp_end(self, run: str) -> int | None:
        """First epoch recorded at the largest eps; None for a run whose eps is always 0."""
        found = [(row["epoch"], row["eps"]) for row in self.records if row["run"] == run]
        top = max(eps for _, eps in found)
        return min(epoch for epoch, eps in found if eps == top) if top > 0 else None


class LipschitzTrace(Trace):
    """Bounds on the spectral norms of the layers during training; a record has ``layer`` and ``bound``.

    The record "all layers" is the bound on the network's Lipschitz constant, for a chain the product of the layers'
    bounds. "all but the last" is the product without the last layer, L^(-1) in Fig. B.2 of Lee (2021).
    """

    NAME = "lipschitz"
    CALLBACK = "lirpa_ext.analysis.LipschitzConstants"
    PANELS: ClassVar[dict[str, str]] = {
        PRODUCT: "Lipschitz constant, product of all layers", BEFORE_LAST: "product of all layers but the last",
    }  # fmt: skip

    def values(self, run: str, panel: str) -> list[tuple[int, float]]:
        """Pairs (epoch, bound) of a run, for a layer or a product."""
        return [(row["epoch"], row["bound"]) for row in self.records if (row["run"], row["layer"]) == (run, panel)]

    def ratio(self, run: str, other: str) -> list[tuple[int, float]]:
        """Pairs (epoch, L^(-1) of `run` / L^(-1) of `other`) at the epochs that both runs have (Fig. B.2)."""
        below = dict(self.values(other, BEFORE_LAST))
        return [(epoch, value / below[epoch]) for epoch, value in self.values(run, BEFORE_LAST) if below.get(epoch)]

    def summary(self) -> str:
        """The product of each run at the start and the end, and for two runs the ratio at the end, in words."""
        ends = {run: self.values(run, PRODUCT) for run in self.runs()}
        told = "; ".join(f"{run} from {found[0][1]:.3g} to {found[-1][1]:.3g}" for run, found in ends.items())
        ratio = self.ratio(*self.runs()) if len(ends) == 2 else []
        tail = f" Of all layers but the last, their ratio ends at {ratio[-1][1]:.3g}." if ratio else ""
        return f"Products of the layers' spectral norms through training: {told}.{tail}"

    def plot(self, axes: Axes, panel: str | None = None) -> None:
        """As `Trace.plot`, with a log scale."""
        super().plot(axes, panel)
        axes.set_yscale("log")


class ActivityTrace(Trace):
    """ReLU activity during training, by IBP bounds at the scheduled eps.

    A record has ``active``, ``unstable`` and ``dead``, mean numbers of neurons per sample; ``chord``, the mean of
    u / (u - l) over the unstable neurons; and ``nonzero``, the fraction of unstable neurons whose lower slope is not 0
    (None for a method without lower slopes).
    """

    NAME = "activity"
    CALLBACK = "lirpa_ext.analysis.ReluActivity"
    PANELS: ClassVar[dict[str, str]] = {
        "active": "active ReLUs, %", "unstable": "unstable ReLUs, %", "dead": "dead ReLUs, %",
        "chord": "mean chord of unstable ReLUs", "nonzero": "non-zero lower slopes, %",
    }  # fmt: skip

    def values(self, run: str, panel: str) -> list[tuple[int, float]]:
        """Pairs (epoch, value) of a run; states and slopes are in percent."""
        rows = [row for row in self.records if row["run"] == run and row[panel] is not None]
        if panel in STATES:
            return [(row["epoch"], 100 * row[panel] / sum(row[state] for state in STATES)) for row in rows]
        return [(row["epoch"], row[panel] * (100 if panel == "nonzero" else 1)) for row in rows]

    def summary(self) -> str:
        """Shares of active, unstable and dead neurons in the last record of each run, in words."""
        told = []
        for run in self.runs():
            last = {panel: found[-1][1] for panel in self.PANELS if (found := self.values(run, panel))}
            told.append(f"{run} " + ", ".join(f"{last[state]:.1f}% {state}" for state in STATES))
        return f"ReLUs at the end of training: {'; '.join(told)}."


# --- records ---


def lipschitz_records(model: nn.Module, x: Tensor) -> list[Row]:
    """Records of `LipschitzTrace` without run, epoch, step and eps: one for each layer, then the two products.

    Args:
        model: The network.
        x: Example input, (B, ...); only its shape matters.
    """
    report = lipschitz(model, x[:1], verbose=False)
    bounds = [layer.bound for layer in report.layers]
    rows: list[Row] = [{"layer": layer.name, "bound": layer.bound} for layer in report.layers]
    return [*rows, {"layer": BEFORE_LAST, "bound": math.prod(bounds[:-1])}, {"layer": PRODUCT, "bound": report.product}]


def activity_record(model: nn.Module, x: Tensor, y: Tensor, eps: float, method: str | None, **ball: Any) -> Row:
    """One record of `ActivityTrace`, without run, epoch, step and eps.

    Args:
        model: The network.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        eps: Radius, in units of the input.
        method: Method with lower slopes, or None.
        **ball: ``norm``, ``x_L`` and ``x_U``.
    """
    found = relu_activity(model, (x, y), eps, **ball)
    counts: Row = dict(zip(STATES, found.total, strict=True))
    chord = None if math.isnan(found.mean_chord) else found.mean_chord
    zero = lower_slopes(model, (x, y), [eps], [method], **ball).shares[0]["zero"] if method else math.nan
    return counts | {"chord": chord, "nonzero": None if math.isnan(zero) else 1 - zero}
