"""Tightness of bounds on one model: tau(x), the sum of worst margins, and the worst-case loss.

S. Lee's dissertation (2021), 3.2.2 and 3.3.4, Figures 3.3, 3.10 and C.9. Let t_i(x; j) = (z_j - z_i) - min (zeta_j -
zeta_i) be the amount by which a method's outer bound lets logit i rise against logit j. Then tau(x) is the mean of
t_i(x; j) over all pairs i != j of the c classes. For balls alone (the method "lipschitz") it is rho sum ||W_i - W_j||_2
/ (c (c - 1)), the same for every x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..domain.specifications import margin_rows
from ..errors import InvalidInputError
from ..methods import label_option
from ..reporting.plots import style
from ..reporting.results import Result, Row
from .subject import Subject, options_by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MEASURES", "Tightness", "plot_tightness", "tightness"]

DEFAULT_METHODS = ("lipschitz", "bcp", "bcp-crown")
BALL = "lipschitz"
MEASURES = {
    "tau": "tau(x): mean translation of the logits",
    "margins": "sum of worst margins of the other classes",
    "loss": "worst-case cross entropy",
}
# Rows that a method without labels bounds in one call; the rows of several labels are bounded together.
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Tightness(Result):
    """Result of `tightness`: measures of each method on each of N samples; lower is tighter in all three measures.

    Attributes:
        eps: Radius of the balls.
        norm: p of the balls.
        tau: Method -> tau(x), (N,).
        margins: Method -> sum over m of the upper bounds of zeta_m - zeta_y, (N,).
        loss: Method -> cross entropy of the worst-case logits, (N,).
        verified: Method -> whether all margins are positive, bool, (N,).
    """

    eps: float
    norm: float
    tau: dict[str, np.ndarray]
    margins: dict[str, np.ndarray]
    loss: dict[str, np.ndarray]
    verified: dict[str, np.ndarray]

    def rows(self) -> list[Row]:
        """One row for each method: means over the samples, and the reduction of tau against the ball, in percent."""
        return [
            {"method": name, "tau": float(values.mean()), "tightened %": self.tightened(name)}
            | {"margins": float(self.margins[name].mean()), "loss": float(self.loss[name].mean())}
            | {"verified %": 100 * float(self.verified[name].mean())}
            for name, values in self.tau.items()
        ]

    def tightened(self, method: str) -> float | None:
        """Mean over the samples of 100 (1 - tau / tau of the ball); None without positive values of the ball."""
        ball = self.tau.get(BALL)
        if ball is None or not (ball > 0).all():
            return None
        return 100 * float((1 - self.tau[method] / ball).mean())

    def details(self) -> list[Row]:
        """One row for each sample and method."""
        return [
            {"sample": i, "method": name, "tau": float(self.tau[name][i]), "margins": float(self.margins[name][i])}
            | {"loss": float(self.loss[name][i]), "verified": bool(self.verified[name][i])}
            for name in self.tau
            for i in range(len(self.tau[name]))
        ]

    def summary(self) -> str:
        """The method of least mean tau, and the reduction of tau by each method against the ball, in words."""
        means = {name: float(values.mean()) for name, values in self.tau.items()}
        best = min(means, key=lambda name: math.inf if math.isnan(means[name]) else means[name])
        gains = ", ".join(
            f"{name} by {self.tightened(name):.1f}%"
            for name in means
            if name != BALL and self.tightened(name) is not None
        )
        return (
            f"Tightness on {len(self.tau[best])} samples at l{self.norm:g} eps {self.eps:g}: the mean tau is least for "
            f"{best}, {means[best]:.4g}." + (f" Against the ball alone, tau is reduced: {gains}." if gains else "")
        )


def tightness(
    model: nn.Module,
    data: Any,
    eps: float,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    batch_size: int = 64,
) -> Tightness:
    """Measure the tightness of several methods, by bounds of every difference of two logits.

    A method that takes labels ("sparse-slope") is called once for each class j, with label j; other methods bound the
    rows of several classes in one call.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        data: (x, y) tensors, a Dataset, or a DataLoader.
        eps: Radius in units of the input.
        methods: Bound methods, default "lipschitz", "bcp" and "bcp-crown".
        options: Method -> its options. A method that draws slopes gets seed 0 unless a seed or generator is given.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        batch_size: Samples at a time, default 64.

    Returns:
        The measures, in float64; NaN where a bound is NaN.

    Raises:
        InvalidInputError: There is no method, or as `Subject`.
        UnknownMethodError: A method is unknown.
        OptionError: An option is wrong, or there are options of a method that is not used.
    """
    subject = Subject(model, data, norm, x_L, x_U, batch_size=batch_size)
    measures: dict[str, dict[str, np.ndarray]] = {"tau": {}, "margins": {}, "loss": {}, "verified": {}}
    for method, chosen in options_by_method(methods, options).items():
        parts = [_measure(subject, x, y, eps, method, chosen) for x, y in subject.batches()]
        for name, values in zip(measures, zip(*parts, strict=True), strict=True):
            measures[name][method] = torch.cat(values).cpu().numpy()
    return Tightness(float(eps), float(norm), **measures)


def _measure(
    subject: Subject, x: Tensor, y: Tensor, eps: float, method: str, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tau, sum of margins, loss and verdict of each sample, (B,) each."""
    with torch.no_grad():
        logits = subject.model(x)
    lower = pair_margins(subject, x, eps, method, options)
    clean = logits.unsqueeze(2) - logits.unsqueeze(1)
    own = lower[torch.arange(len(y)), y]  # (B, c): z_y - z_m of the label's row, 0 at m = y
    apart = ~torch.eye(subject.classes, dtype=torch.bool, device=x.device)
    others = apart[y]
    tau = (clean - lower)[:, apart].mean(1)
    verified = (own > 0)[others].view(len(y), -1).all(1)
    return tau, -own.sum(1), functional.cross_entropy(-own, y, reduction="none"), verified


def pair_margins(subject: Subject, x: Tensor, eps: float, method: str, options: dict[str, Any]) -> Tensor:
    """Lower bounds of all differences of two logits over the set of each sample.

    Args:
        subject: Model and perturbation set.
        x: Inputs, (B, ...).
        eps: Radius, in units of the input.
        method: Any method of `BoundedModule.compute_bounds`.
        options: Options of the method.

    Returns:
        (B, c, c); entry (j, i) is the lower bound of zeta_j - zeta_i, and 0 for j = i.
    """
    c = subject.classes
    together = 1 if label_option(method, subject.y) else max(1, _ROWS_AT_ONCE // (c - 1))
    lower = x.new_zeros(len(x), c, c)
    for labels in torch.arange(c, device=x.device).split(together):
        rows = margin_rows(labels, c, x.dtype).reshape(1, -1, c).expand(len(x), -1, -1)
        bound = subject.lower(x, labels[:1].expand(len(x)), eps, rows, method, options)
        for j, margins in zip(labels.tolist(), bound.split(c - 1, dim=1), strict=True):
            lower[:, j, :j], lower[:, j, j + 1 :] = margins[:, :j], margins[:, j:]
    return lower


def plot_tightness(result: Tightness, axes: Axes, measure: str = "tau") -> None:
    """Plot a measure, one violin with its mean for each method; for tau, the ball's value is a dotted line.

    Args:
        result: Result of `tightness`.
        axes: Axes to draw on.
        measure: A key of `MEASURES`, default "tau".

    Raises:
        InvalidInputError: The measure is unknown.
    """
    if measure not in MEASURES:
        raise InvalidInputError(f"unknown measure {measure!r}: known are {', '.join(MEASURES)}")
    values: dict[str, np.ndarray] = dict(getattr(result, measure))
    ball = values.pop(BALL, None) if measure == "tau" and len(values) > 1 else None
    colors = {name: style(number)["color"] for number, name in enumerate(getattr(result, measure))}
    for number, (name, one) in enumerate(values.items()):
        finite = one[np.isfinite(one)]
        if not len(finite):
            continue
        drawn = axes.violinplot(finite, [number], showextrema=False)
        for body in drawn["bodies"]:  # type: ignore[attr-defined]
            body.set(facecolor=colors[name], alpha=0.4)
        axes.plot([number], [finite.mean()], color=colors[name], marker="o")
        axes.annotate(
            f"{finite.mean():.3g}", (number, finite.mean()), (6, 4), textcoords="offset points", fontsize="small"
        )
    if ball is not None:
        axes.axhline(float(ball.mean()), color="black", linestyle=":", label=f"ball alone ({BALL}): {ball.mean():.3g}")
        axes.legend(fontsize="small")
    axes.set_xticks(range(len(values)), list(values), rotation=20 if len(values) > 4 else 0)
    axes.set(ylabel=MEASURES[measure], title=f"l{result.norm:g} eps {result.eps:g}")
