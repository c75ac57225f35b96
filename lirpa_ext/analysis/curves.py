"""Verified accuracy over eps (Fig. 3.4, B.3 of S. Lee, 2021), by `lirpa_ext.certify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..attacks import APGD
from ..certification.certify import certify
from ..data import gather
from ..errors import InvalidInputError
from ..reporting.plots import style
from ..reporting.results import Result, Row
from .subject import options_by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curves", "plot_curves", "verified_curves"]


@dataclass(frozen=True)
class Curves(Result):
    """Clean, PGD and verified accuracy at each eps, for each model and method.

    Attributes:
        norm: p of the ball.
        samples: Number of samples.
        levels: One dict for each model, method and eps: model, method, eps; clean, pgd (None without an attack) and
            verified, as fractions; errors, a count.
        targets: Model -> radius at which it was trained, where that is known.
    """

    norm: float
    samples: int
    levels: list[Row]
    targets: dict[str, float]

    def rows(self) -> list[Row]:
        """One row for each model, method and eps, accuracies in percent."""
        return [
            {key: row[key] for key in ("model", "method", "eps")}
            | {f"{key} %": None if row[key] is None else 100 * row[key] for key in ("clean", "pgd", "verified")}
            | {"errors": row["errors"]}
            for row in self.levels
        ]

    def curve(self, model: str, method: str) -> tuple[list[float], list[float]]:
        """Every eps, and the verified accuracy there as a fraction, for a model and a method."""
        found = [row for row in self.levels if (row["model"], row["method"]) == (model, method)]
        return [row["eps"] for row in found], [row["verified"] for row in found]

    def lines(self) -> list[tuple[str, str]]:
        """Pairs (model, method), without repetition."""
        return list(dict.fromkeys((row["model"], row["method"]) for row in self.levels))

    def summary(self) -> str:
        """The highest curve at the smallest and at the largest eps, in words."""
        told = []
        for eps in dict.fromkeys((self.levels[0]["eps"], self.levels[-1]["eps"])):
            best = max((row for row in self.levels if row["eps"] == eps), key=lambda row: row["verified"])
            told.append(f"at eps {eps:g} {best['model']} by {best['method']}, {100 * best['verified']:.1f}%")
        return (
            f"Verified accuracy of {self.samples} samples in l{self.norm:g} balls over eps, {len(self.lines())} "
            f"curves; the highest is {', '.join(told)}."
        )


def verified_curves(
    models: Mapping[str, nn.Module],
    data: Any,
    eps: Sequence[float],
    methods: Sequence[str] = ("bcp",),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    targets: Mapping[str, float] | None = None,
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    attack_steps: int = 20,
    attack_restarts: int = 2,
    batch_size: int = 64,
    seed: int = 0,
) -> Curves:
    """Certify each model by each method at each eps.

    Args:
        models: Name, for the plot, -> classifier, (B, ...) -> (B, classes).
        data: (x, y) tensors, a Dataset, or a DataLoader.
        eps: Radii in units of the input.
        methods: Methods of `BoundedModule.compute_bounds`, default "bcp".
        options: Method -> its options. A method that draws slopes gets seed 0 unless a seed or generator is given.
        targets: Name of a model -> radius at which it was trained; default none.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        attack_steps: Steps of a run of Auto-PGD, default 20; 0 for no attack.
        attack_restarts: Runs of Auto-PGD, default 2.
        batch_size: Samples at a time, default 64.
        seed: Seed of the attack, default 0.

    Returns:
        The curves.

    Raises:
        InvalidInputError: There is no model or no method; or as `lirpa_ext.certify`, which raises further errors.
        OptionError: There are options of a method that is not used.
    """
    if not models:
        raise InvalidInputError("curves are of at least one model, got none")
    chosen = options_by_method(methods, options)
    pair = gather(data)
    levels: list[Row] = []
    for name, model in models.items():
        for method in methods:
            report = certify(
                model, pair, list(eps), norm, method, options=chosen[method], x_L=x_L, x_U=x_U,
                attack=APGD(attack_steps, attack_restarts) if attack_steps else None,
                radius=False, batch_size=batch_size, progress=False, seed=seed,
            )  # fmt: skip
            levels += [
                {"model": name, "method": method, "errors": row["error"]}
                | {key: row[key] for key in ("eps", "clean", "pgd", "verified")}
                for row in report.summary()
            ]
    return Curves(float(norm), len(pair[0]), levels, dict(targets or {}))


def plot_curves(result: Curves, axes: Axes) -> None:
    """Plot verified accuracy, one line for each model and method, with PGD accuracies and vertical lines at targets.

    Args:
        result: Result of `verified_curves`.
        axes: Axes to draw on.
    """
    names = list(dict.fromkeys(model for model, _ in result.lines()))
    for number, (model, method) in enumerate(result.lines()):
        eps, verified = result.curve(model, method)
        axes.plot(
            eps, [100 * v for v in verified], label=f"{model}, {method}" if len(names) > 1 else method, **style(number)
        )
    for number, model in enumerate(names):
        first = next(method for name, method in result.lines() if name == model)
        found = [row for row in result.levels if (row["model"], row["method"]) == (model, first)]
        if found[0]["pgd"] is not None:
            shown: dict[str, Any] = {
                "color": style(number)["color"] if len(names) > 1 else "black",
                "alpha": 0.5,
                "linewidth": 1,
            }
            label = f"{model}, PGD" if len(names) > 1 else "PGD"
            axes.plot([row["eps"] for row in found], [100 * row["pgd"] for row in found], ":", label=label, **shown)
    for target in dict.fromkeys(result.targets.values()):
        axes.axvline(target, color="#888888", linewidth=1)
    axes.set(xlabel=f"eps of the l{result.norm:g} ball", ylabel="verified accuracy, %", ylim=(0, 101), xlim=(0, None))
    axes.legend(fontsize="small")
