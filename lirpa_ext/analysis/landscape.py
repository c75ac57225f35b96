"""Smoothness of a loss in the weights: its variation along the gradient, and the change of the gradient in one step.

The measures of Fig. 3.6 to 3.9 of S. Lee's dissertation (2021), defined in C.1.1 there, after S. Santurkar et al., How
does batch normalization help optimization?, NeurIPS 2018. They apply to any loss; `lirpa_ext.analysis.Smoothness`
records them during training.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidInputError, ResultsError
from ..reporting.plots import figure, style
from ..reporting.results import Result, Row, read_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "LENGTHS",
    "Measures",
    "SmoothnessComparison",
    "SmoothnessTrace",
    "log_lengths",
    "plot_smoothness",
    "smoothness",
]


def log_lengths(points: int = 10, longest: float = 5.0) -> tuple[float, ...]:
    """Step lengths from longest / 100 to `longest`, equidistant on a log scale.

    Lee (2021) uses ten lengths up to 5 and does not state the shortest; 0.05 is our choice.

    Args:
        points: Number of lengths, default 10; a single one is `longest`.
        longest: The longest length, default 5.

    Raises:
        InvalidInputError: `points` is below 1, or `longest` is not positive and finite.
    """
    if points < 1 or not 0 < longest < math.inf:
        raise InvalidInputError(f"step lengths are 1 or more points up to a positive length, got {points}, {longest}")
    return tuple(longest * 100.0 ** (k / max(points - 1, 1) - 1) for k in range(points)) if points > 1 else (longest,)


LENGTHS = log_lengths()
MEASURES = ("variation", "gradient_distance", "cosine_distance", "gradient_norm")


@dataclass(frozen=True)
class Measures:
    """Smoothness of a loss at one point of the weights, result of `smoothness`.

    Attributes:
        loss: Loss at the point.
        lowest: Lowest loss along the negative gradient, the point itself included.
        highest: Highest loss along the negative gradient, the point itself included.
        gradient_norm: l2 norm of the gradient at the point.
        gradient_distance: l2 distance to the gradient at the next point.
        cosine_distance: 1 - cosine of the angle between the two gradients, in [0, 2]; NaN if a gradient is 0.
    """

    loss: float
    lowest: float
    highest: float
    gradient_norm: float
    gradient_distance: float
    cosine_distance: float

    @property
    def variation(self) -> float:
        """highest - lowest, the width of the band of Fig. 3.6."""
        return self.highest - self.lowest


def smoothness(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    step_size: float,
    following: Sequence[Tensor] | None = None,
    lengths: Sequence[float] = LENGTHS,
) -> Measures:
    """Variation of a loss along its gradient (Lee, 2021, C.1.2), and distances of successive gradients (C.1.1).

    With g the gradient at the weights theta, the loss is evaluated at theta - length * step_size * g for each length. A
    steadily falling loss has a variation too. On a quadratic with Hessian H, one step of gradient descent moves the
    gradient by step_size ||H g||.

    Args:
        loss_fn: Function without arguments that gives the loss, 0-dim, at the present values of `params`. It must
            depend on nothing else, so random draws must use the same seed in each call. It is called
            2 + ``len(lengths)`` times, twice with gradients.
        params: Tensors that require gradients; they are changed in place and restored, also after an error.
        step_size: Learning rate of the optimizer, above 0.
        following: Values after the optimizer's step, of the shapes of `params`. Default: the values after a step of
            gradient descent, theta - step_size * g.
        lengths: Step lengths in units of step_size * g, default ten from 0.05 to 5.

    Returns:
        The measures; a value that is not finite is kept.

    Raises:
        InvalidInputError: `step_size` or a length is not positive, or `following` has other shapes.

    Example:
        >>> theta = torch.tensor([2.0, 0.0], requires_grad=True)
        >>> found = smoothness(lambda: theta.square().sum() / 2, [theta], step_size=0.5, lengths=[1.0, 2.0])
        >>> found.highest, found.lowest, found.gradient_distance, found.cosine_distance
        (2.0, 0.0, 1.0, 0.0)
    """
    variables = list(params)
    if not 0 < step_size < math.inf or not all(0 < length < math.inf for length in lengths):
        raise InvalidInputError(f"step_size and lengths must be positive, got {step_size} and {tuple(lengths)}")
    if following is not None and [t.shape for t in following] != [v.shape for v in variables]:
        raise InvalidInputError("following must have one tensor for each of params, of its shape")
    start = [variable.detach().clone() for variable in variables]
    try:
        loss, gradient = _loss_and_gradient(loss_fn, variables)
        losses = [loss]
        for length in lengths:
            _place(variables, start, gradient, -length * step_size)
            with torch.no_grad():
                losses.append(loss_fn().detach())
        if following is None:
            _place(variables, start, gradient, -step_size)
        else:
            _place(variables, following)
        _, after = _loss_and_gradient(loss_fn, variables)
    finally:
        _place(variables, start)
    low, high = torch.stack([value.double() for value in losses]).aminmax()
    flat, flat_after = (torch.cat([part.flatten().double() for part in parts]) for parts in (gradient, after))
    norms = flat.norm() * flat_after.norm()
    cosine = float((flat @ flat_after) / norms) if norms > 0 else math.nan
    return Measures(
        float(loss), float(low), float(high), float(flat.norm()), float((flat_after - flat).norm()),
        min(max(1 - cosine, 0.0), 2.0) if math.isfinite(cosine) else math.nan,
    )  # fmt: skip


def _loss_and_gradient(loss_fn: Callable[[], Tensor], variables: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        loss = loss_fn()
        found = torch.autograd.grad(loss, variables, allow_unused=True)
    pairs = zip(found, variables, strict=True)
    return loss.detach(), [torch.zeros_like(v) if g is None else g.detach() for g, v in pairs]


@torch.no_grad()
def _place(
    variables: Sequence[Tensor], start: Sequence[Tensor], step: Sequence[Tensor] | None = None, scale: float = 0.0
) -> None:
    """Set each variable to start + scale * step."""
    for number, (variable, value) in enumerate(zip(variables, start, strict=True)):
        variable.copy_(value if step is None else value + scale * step[number])


@dataclass(frozen=True)
class SmoothnessTrace(Result):
    """Smoothness during training, as recorded by `lirpa_ext.analysis.Smoothness`.

    Attributes:
        records: One dict for each measured step and loss: ``step``, ``epoch``, ``at`` ("scheduled" for the loss of that
            step, "target" for the loss at the end of the schedule), ``eps`` and the weights of the schedule,
            ``step_size``, the fields of `Measures`, ``variation``, and ``seconds`` (time of the measurement).
    """

    records: tuple[Row, ...]

    def rows(self) -> list[Row]:
        """The records."""
        return list(self.records)

    def chosen(self, at: str = "scheduled", ramp: bool = False) -> list[Row]:
        """Records of one loss.

        Args:
            at: "scheduled" (default) or "target".
            ramp: Whether to take only steps strictly between the warm-up and the end of the ramp, where Lee (2021)
                compares; default False.

        Raises:
            InvalidInputError: `at` is neither.
        """
        if at not in ("scheduled", "target"):
            raise InvalidInputError(f"a trace is of the scheduled or of the target loss, not of {at!r}")
        targets = {row["step"]: row["eps"] for row in self.records if row["at"] == "target"}
        found = [row for row in self.records if row["at"] == at]
        if not ramp:
            return found
        moving = {
            row["step"]
            for row in self.records
            if row["at"] == "scheduled" and 0 < row["eps"] < targets.get(row["step"], math.inf)
        }
        return [row for row in found if row["step"] in moving]

    def median(self, measure: str, at: str = "scheduled", ramp: bool = False) -> float:
        """Median of a measure over the records of `chosen`; NaN if there are none."""
        values = [float(row[measure]) for row in self.chosen(at, ramp) if row[measure] is not None]
        return statistics.median(values) if values else math.nan

    def summary(self) -> str:
        """Medians of the measures at the scheduled and at the target loss, in words."""
        parts = []
        for at in ("scheduled", "target"):
            count = len(self.chosen(at))
            if count:
                parts.append(
                    f"At the {at} loss ({count} steps measured), the medians are: loss variation "
                    f"{self.median('variation', at):.3g}, l2 distance of successive gradients "
                    f"{self.median('gradient_distance', at):.3g}, cosine distance "
                    f"{self.median('cosine_distance', at):.3g}."
                )
        return " ".join(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SmoothnessTrace:
        """Read the JSON file of `save`.

        Raises:
            ResultsError: The file cannot be read, or holds something else.
        """
        content = read_result(path)
        if content is None or content["analysis"] != cls.__name__:
            raise ResultsError(f"{path} holds no {cls.__name__}: it is written by lirpa_ext.analysis.Smoothness")
        return cls(tuple(content["rows"]))


@dataclass(frozen=True)
class SmoothnessComparison(Result):
    """Medians of the smoothness of several runs, over the ramp of a run if it has one.

    Attributes:
        traces: Name of a run -> its trace.
    """

    traces: dict[str, SmoothnessTrace]

    def rows(self) -> list[Row]:
        """One row for each run and loss: number of steps, and medians of `MEASURES`."""
        return [
            {"run": name, "at": at, "steps": len(trace.chosen(at, ramp) or trace.chosen(at))}
            | {measure: trace.median(measure, at, ramp) for measure in MEASURES}
            for name, trace in self.traces.items()
            for at in ("scheduled", "target")
            for ramp in [bool(trace.chosen(at, ramp=True))]
            if trace.chosen(at)
        ]

    def summary(self) -> str:
        """The runs in order of each measure, in words."""
        told = []
        for at in ("scheduled", "target"):
            rows = [row for row in self.rows() if row["at"] == at]
            for measure in MEASURES[:3] if rows else ():
                order = sorted(rows, key=lambda row: (math.isnan(row[measure]), row[measure]))
                names = ", ".join(f"{row['run']} {row[measure]:.3g}" for row in order)
                told.append(f"{measure.replace('_', ' ')} at the {at} loss, from the smoothest: {names}.")
        return " ".join(text[:1].upper() + text[1:] for text in told)


def record(measures: Measures, seconds: float, **where: Any) -> Row:
    """Make a record of `SmoothnessTrace`.

    Args:
        measures: The measures.
        seconds: Time of the measurement.
        **where: Further entries, such as step, epoch and eps.
    """
    found = asdict(measures) | {"variation": measures.variation, "seconds": seconds}
    shown = {name: float(f"{value:.6g}") for name, value in found.items()}
    return where | {name: value if math.isfinite(value) else None for name, value in shown.items()}


def plot_smoothness(traces: Mapping[str, SmoothnessTrace], at: str = "scheduled") -> Figure:
    """Plot learning curves with bands along the gradient, variation, and distances of gradients, over the steps.

    Fig. 3.6 and 3.7 of Lee (2021), or Fig. 3.8 for the target loss.

    Args:
        traces: Name of a run -> its trace.
        at: "scheduled" (default) or "target".

    Returns:
        The figure with four axes, one below the other; the measures are on a log scale.
    """
    told = "; ".join(
        f"{name}: variation {trace.median('variation', at):.3g}, gradient distance "
        f"{trace.median('gradient_distance', at):.3g}, cosine distance {trace.median('cosine_distance', at):.3g}"
        for name, trace in traces.items()
    )
    drawn, axes = figure(
        f"Smoothness of the {at} loss over the steps of training, lower is smoother. Medians: {told}.",
        rows=4, size=(5.4, 9.6), sharex=True,
    )  # fmt: skip
    panels = (
        ("variation", "loss variation"),
        ("gradient_distance", "l2 distance of\nsuccessive gradients"),
        ("cosine_distance", "cosine distance of\nsuccessive gradients"),
    )
    for number, (name, trace) in enumerate(traces.items()):
        rows = trace.chosen(at)
        steps = [row["step"] for row in rows]
        look = style(number, markers=False)
        losses, lowest, highest = (_values(rows, key) for key in ("loss", "lowest", "highest"))
        axes[0, 0].plot(steps, losses, label=name, **look)
        axes[0, 0].fill_between(steps, lowest, highest, color=look["color"], alpha=0.2, linewidth=0)
        for (key, _), ax in zip(panels, axes[1:, 0], strict=True):
            ax.plot(steps, _values(rows, key), label=name, **look)
    axes[0, 0].set(ylabel=f"{at} loss,\nband along the gradient")
    axes[0, 0].legend()
    for (_, label), ax in zip(panels, axes[1:, 0], strict=True):
        ax.set(ylabel=label, yscale="log")
    axes[-1, 0].set(xlabel="step")
    return drawn


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]
