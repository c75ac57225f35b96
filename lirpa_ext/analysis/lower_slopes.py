"""The lower slopes that methods choose for unstable ReLUs: shares of slopes 0, 1, and between (Fig. 3.11).

S. Lee's dissertation (2021), 3.3.3 and 3.3.4, relates a larger share of zero slopes to a smoother loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError, OptionError
from ..methods import is_ours
from ..reporting.plots import style
from ..reporting.results import Result, Row
from .subject import Subject, options_by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LowerSlopes", "has_slopes", "lower_slopes", "plot_lower_slopes"]

DEFAULT_METHODS = ("sparse-slope", "slope:crown", "slope:cap", "slope:random")


@dataclass(frozen=True)
class LowerSlopes(Result):
    """Result of `lower_slopes`: shares of the lower slopes that methods choose for unstable ReLUs.

    Attributes:
        norm: p of the ball.
        samples: Number of samples.
        shares: One dict for each method and eps: ``method``, ``eps``, ``unstable`` (mean number of unstable neurons per
            sample); ``zero``, ``between`` and ``one``, the fractions of the unstable neurons with such a slope (NaN
            if no neuron is unstable); ``idle``, the fraction whose slope has gradient 0 in the method's step, because
            no margin depends on it (None for a method without gradient step).
    """

    norm: float
    samples: int
    shares: list[Row]

    def rows(self) -> list[Row]:
        """One row for each method and eps: shares in percent, and the share of slopes other than 0."""
        return [
            {key: row[key] for key in ("method", "eps", "unstable")}
            | {f"{key} %": 100 * row[key] for key in ("zero", "between", "one")}
            | {"non-zero %": 100 * (row["between"] + row["one"])}
            | {"no gradient %": None if row["idle"] is None else 100 * row["idle"]}
            for row in self.shares
        ]

    def sparsity(self, method: str) -> tuple[list[float], list[float]]:
        """Every eps, and the fraction of zero slopes there, for a method."""
        found = [row for row in self.shares if row["method"] == method]
        return [row["eps"] for row in found], [row["zero"] for row in found]

    def methods(self) -> list[str]:
        """Names of the methods, without repetition."""
        return list(dict.fromkeys(row["method"] for row in self.shares))

    def summary(self) -> str:
        """Fraction of zero slopes of each method at the smallest and the largest eps, in words."""
        ends = {name: self.sparsity(name) for name in self.methods()}
        told = "; ".join(
            f"{name} {100 * zero[0]:.1f}% at eps {eps[0]:g}"
            + (f", {100 * zero[-1]:.1f}% at eps {eps[-1]:g}" if len(eps) > 1 else "")
            for name, (eps, zero) in ends.items()
        )
        return f"Share of zero lower slopes of unstable ReLUs on {self.samples} samples, l{self.norm:g} balls: {told}."


def lower_slopes(
    model: nn.Module,
    data: Any,
    eps: Sequence[float],
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    norm: float = math.inf,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    batch_size: int = 64,
) -> LowerSlopes:
    """Shares of the lower slopes 0, between 0 and 1, and 1 of unstable ReLUs, for each method and eps.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        data: (x, y) tensors, a Dataset, or a DataLoader.
        eps: Radii in units of the input.
        methods: "sparse-slope" and "slope:..." (except "slope:ibp" and "slope:same"); default `METHODS`.
        options: Method -> its options. A method that draws slopes gets seed 0 unless a seed or generator is given.
        norm: p of the lp ball, default inf.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        batch_size: Samples at a time, default 64.

    Returns:
        The shares.

    Raises:
        OptionError: A method has no lower slopes, or there are options of a method that is not used.
        InvalidInputError: There is no eps or no method, or as `Subject`.
    """
    if not len(eps):
        raise InvalidInputError("lower_slopes looks at one eps or more, got none")
    for method in methods:
        if not has_slopes(method):
            raise OptionError(
                f"{method!r} has no lower slopes to count: take {', '.join(DEFAULT_METHODS)} or slope:P,Q"
            )
    subject = Subject(model, data, norm, x_L, x_U, batch_size=batch_size)
    shares = [
        {"method": method, "eps": float(level)} | _shares(subject, float(level), method, chosen)
        for method, chosen in options_by_method(methods, options).items()
        for level in eps
    ]
    return LowerSlopes(float(norm), len(subject.x), shares)


def has_slopes(method: str) -> bool:
    """Whether a bound method is one of the package that chooses lower slopes of ReLUs."""
    name = method.lower()
    return is_ours(name) and name.startswith(("sparse-slope", "slope:")) and name not in ("slope:ibp", "slope:same")


def _shares(subject: Subject, eps: float, method: str, options: dict[str, Any]) -> Row:
    counts, idle, stepped = torch.zeros(3, dtype=torch.float64), 0, False
    for x, y in subject.batches():
        rows = torch.eye(subject.classes, dtype=x.dtype, device=x.device)[y].unsqueeze(1)
        subject.lower(x, y, eps, rows, method, options)
        result = subject.graph(x).last_result
        assert result is not None and result.relaxation is not None
        relaxation = result.relaxation
        for name, mask in relaxation.unstable.items():
            slopes = relaxation.slopes[name][mask]
            zero, one = (slopes == 0).sum().cpu(), (slopes == 1).sum().cpu()
            counts += torch.stack([zero, slopes.numel() - zero - one, one])
            if relaxation.gradients is not None:
                stepped, idle = True, idle + int((relaxation.gradients[name][mask] == 0).sum())
    total = float(counts.sum())
    fractions = (counts / total).tolist() if total else [math.nan] * 3
    shares: Row = dict(zip(("zero", "between", "one"), fractions, strict=True))
    return {"unstable": total / len(subject.x)} | shares | {"idle": idle / total if stepped and total else None}


def plot_lower_slopes(result: LowerSlopes, axes: Axes) -> None:
    """Plot the share of non-zero lower slopes over eps, one line for each method.

    Args:
        result: Result of `lower_slopes`.
        axes: Axes to draw on.
    """
    for number, method in enumerate(result.methods()):
        eps, zero = result.sparsity(method)
        axes.plot(eps, [100 * (1 - share) for share in zero], label=method, **style(number))
    axes.set(
        xlabel=f"eps of the l{result.norm:g} ball", ylabel="non-zero lower slopes of unstable ReLUs, %", ylim=(0, 101)
    )
    axes.legend(fontsize="small")
