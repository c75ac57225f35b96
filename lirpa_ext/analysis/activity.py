"""ReLU activity: active, unstable and dead neurons by layer (Fig. C.6, C.7), and slopes of the chords (Fig. C.8).

S. Lee's dissertation (2021), C.6. With bounds [l, u] on its input, a ReLU is active if l >= 0 and u > 0, dead if
u <= 0, and unstable if l < 0 < u. Only for unstable ReLUs does a relaxation differ from the function. (Lee (2021)
counts l = 0 and u = 0 as unstable too.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..reporting.plots import COLORS, style
from ..reporting.results import Result, Row
from .subject import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Activity", "plot_activity", "plot_chords", "relu_activity"]

STATES = ("active", "unstable", "dead")
BINS = 20


@dataclass(frozen=True)
class Activity(Result):
    """Result of `relu_activity`: mean numbers of neurons in each state, and histograms of the slopes of chords.

    Attributes:
        eps: Radius of the balls.
        norm: p of the balls.
        intermediate: Method of the bounds on ReLU inputs, "ibp" or "bcp".
        samples: Number of samples.
        counts: Layer -> (active, unstable, dead) neurons, means over the samples.
        chords: Layer -> histogram of u / (u - l) of the unstable neurons of all samples, `BINS` counts over [0, 1].
        mean_chord: Mean of u / (u - l) over the unstable neurons of all layers; NaN if no neuron is unstable.
    """

    eps: float
    norm: float
    intermediate: str
    samples: int
    counts: dict[str, tuple[float, float, float]]
    chords: dict[str, np.ndarray]
    mean_chord: float

    @property
    def total(self) -> tuple[float, float, float]:
        """(active, unstable, dead) of the whole network."""
        active, unstable, dead = (float(part) for part in np.sum(list(self.counts.values()), axis=0))
        return active, unstable, dead

    def rows(self) -> list[Row]:
        """One row for each layer and one for all layers: mean counts per sample, and shares in percent."""
        every = {**self.counts, "all": self.total}
        return [
            {"layer": layer, "neurons": sum(counts)}
            | dict(zip(STATES, counts, strict=True))
            | {f"{name} %": 100 * count / sum(counts) for name, count in zip(STATES, counts, strict=True)}
            for layer, counts in every.items()
        ]

    def details(self) -> list[Row]:
        """The histograms of chords: one row for each layer and bin."""
        return [
            {"layer": layer, "from": i / BINS, "to": (i + 1) / BINS, "unstable": int(count)}
            for layer, histogram in self.chords.items()
            for i, count in enumerate(histogram)
        ]

    def summary(self) -> str:
        """Shares of active, unstable and dead neurons in the whole network, in words."""
        told = ", ".join(f"{100 * n / sum(self.total):.1f}% {name}" for n, name in zip(self.total, STATES, strict=True))
        return (
            f"ReLUs by their {self.intermediate.upper()} boxes on {self.samples} samples at l{self.norm:g} eps "
            f"{self.eps:g}: {told} of {sum(self.total):.0f}."
        )


def relu_activity(
    model: nn.Module,
    data: Any,
    eps: float,
    intermediate: str = "ibp",
    *,
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    batch_size: int = 64,
) -> Activity:
    """Count active, unstable and dead ReLUs (and LeakyReLUs).

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        data: (x, y) tensors, a Dataset, or a DataLoader.
        eps: Radius in units of the input.
        intermediate: Method of the bounds on ReLU inputs, "ibp" (default) or "bcp" (ball and box).
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        batch_size: Samples at a time, default 64.

    Returns:
        Mean counts of neurons, and histograms of chords.

    Raises:
        InvalidInputError: A bound is NaN or infinite, the network has no ReLU, or as `Subject`.
        OptionError: `intermediate` is unknown.
    """
    subject = Subject(model, data, norm, x_L, x_U, batch_size=batch_size)
    counts: dict[str, np.ndarray] = {}
    chords: dict[str, np.ndarray] = {}
    slopes = torch.zeros(2, dtype=torch.float64)  # sum and number
    for x, _ in subject.batches():
        with torch.no_grad():
            boxes = subject.graph(x).activation_bounds(subject.perturbed(x, eps), intermediate)
        for number, (lower, upper) in enumerate(boxes.values(), 1):
            if not (lower.isfinite() & upper.isfinite()).all():
                raise InvalidInputError(f"the box before ReLU {number} is NaN or infinite: take a smaller eps")
            layer = f"ReLU {number}"
            active, dead = (lower >= 0) & (upper > 0), upper <= 0
            found = [int(state.sum()) for state in (active, ~active & ~dead, dead)]
            slope = (upper / (upper - lower))[~active & ~dead]
            histogram = torch.histc(slope, BINS, 0.0, 1.0).cpu().numpy().astype(np.int64)
            slopes += torch.tensor([float(slope.sum()), slope.numel()], dtype=torch.float64)
            counts[layer] = counts.get(layer, 0) + np.array(found)
            chords[layer] = chords.get(layer, 0) + histogram
    if not counts:
        raise InvalidInputError("the network has no ReLU whose input is perturbed")
    size = len(subject.x)
    means = {name: (float(a) / size, float(u) / size, float(d) / size) for name, (a, u, d) in counts.items()}
    mean_chord = float(slopes[0] / slopes[1])  # 0 / 0 is NaN
    return Activity(float(eps), float(norm), intermediate, size, means, chords, mean_chord)


def plot_activity(result: Activity, axes: Axes) -> None:
    """Plot the shares of active, unstable and dead neurons, one bar for each layer.

    Args:
        result: Result of `relu_activity`.
        axes: Axes to draw on.
    """
    rows = result.rows()
    left = np.zeros(len(rows))
    hatches = ("", "//", "..")
    for name, shown, hatch in zip(STATES, ("green", "orange", "vermillion"), hatches, strict=True):
        share = np.array([row[f"{name} %"] for row in rows])
        axes.barh(range(len(rows)), share, left=left, color=COLORS[shown], hatch=hatch, edgecolor="white", label=name)
        left += share
    axes.set_yticks(range(len(rows)), [f"{row['layer']} ({row['neurons']:.0f})" for row in rows])
    axes.invert_yaxis()
    axes.set(
        xlabel="share of the neurons, %",
        xlim=(0, 100),
        title=f"{result.intermediate.upper()} boxes, l{result.norm:g} eps {result.eps:g}",
    )
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def plot_chords(result: Activity, axes: Axes) -> None:
    """Plot the histograms of u / (u - l), one line for each layer, in percent of the layer's unstable neurons.

    Args:
        result: Result of `relu_activity`.
        axes: Axes to draw on.
    """
    for number, (layer, histogram) in enumerate(result.chords.items()):
        if histogram.sum():
            shown = {key: style(number)[key] for key in ("color", "linestyle")}
            axes.stairs(
                100 * histogram / histogram.sum(), np.linspace(0, 1, BINS + 1), label=layer, linewidth=1.5, **shown
            )
    axes.set(
        xlabel="slope of the chord, u / (u - l)", ylabel="share of the unstable neurons, %", xlim=(0, 1), ylim=(0, None)
    )
    axes.legend(fontsize="small")
