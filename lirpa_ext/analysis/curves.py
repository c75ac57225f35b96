"""Verified accuracy over eps (Fig. 3.4, B.3), and clean against robust accuracy (Fig. B.4).

S. Lee's dissertation (2021), 3.2.2 and B.3.4. The certificates are those of `lirpa_ext.certify`, the trade-off's runs
those of `lirpa_ext.training.sweep`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..certify import certify
from ..data import gather
from ..errors import InvalidInputError, ResultsError
from .plots import style
from .results import Result, Row
from .subject import options_by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curves", "TradeOff", "plot_curves", "plot_trade_off", "read_trade_off", "verified_curves"]


@dataclass(frozen=True)
class Curves(Result):
    """Clean, PGD and verified accuracy at each eps, for each model and method.

    Attributes:
        norm: p of the ball.
        samples: Number of samples.
        levels: One dict for each model, method and eps: model, method, eps; clean, pgd (None without an attack) and
            verified, as fractions; errors, a count.
        targets: Radius that a model was trained at, by model, where it is known.
    """

    norm: float
    samples: int
    levels: list[Row]
    targets: dict[str, float]

    def rows(self) -> list[Row]:
        """The levels, accuracies in percent."""
        return [
            {key: row[key] for key in ("model", "method", "eps")}
            | {f"{key} %": None if row[key] is None else 100 * row[key] for key in ("clean", "pgd", "verified")}
            | {"errors": row["errors"]}
            for row in self.levels
        ]

    def curve(self, model: str, method: str) -> tuple[list[float], list[float]]:
        """(eps, fraction verified) of a model and method, by eps."""
        found = [row for row in self.levels if (row["model"], row["method"]) == (model, method)]
        return [row["eps"] for row in found], [row["verified"] for row in found]

    def lines(self) -> list[tuple[str, str]]:
        """The models and methods, each once."""
        return list(dict.fromkeys((row["model"], row["method"]) for row in self.levels))

    def summary(self) -> str:
        """The highest curve at each end."""
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
        models: Classifiers by the name that the plot shows.
        data: (x, y) tensors, a Dataset, or a DataLoader.
        eps: Radii in units of the input.
        methods: Default "bcp".
        options: Options by method; those whose slopes are drawn get a fixed seed unless they say otherwise.
        targets: Radius that a model was trained at, by its name.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        attack_steps: Steps of a run of the attack (`certify`), default 20; 0 for no attack.
        attack_restarts: Its runs, default 2.
        batch_size: Samples at a time.
        seed: Of the attack.

    Returns:
        The curves.

    Raises:
        InvalidInputError: No model or no method; else what `lirpa_ext.certify` raises.
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
                attack_steps=attack_steps, attack_restarts=attack_restarts,
                radius=False, batch_size=batch_size, progress=False, seed=seed,
            )  # fmt: skip
            levels += [
                {"model": name, "method": method, "errors": row["error"]}
                | {key: row[key] for key in ("eps", "clean", "pgd", "verified")}
                for row in report.summary()
            ]
    return Curves(float(norm), len(pair[0]), levels, dict(targets or {}))


def plot_curves(result: Curves, axes: Axes) -> None:
    """A line for each model and method, PGD's accuracy of each model in pale, a vertical line at each target."""
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


# --- clean against robust accuracy ---


@dataclass(frozen=True)
class TradeOff(Result):
    """Standard accuracy against the interval from verified to PGD accuracy, one point a run.

    Attributes:
        runs: One dict for each run, as `lirpa_ext.training.sweep.sweep` returns them: loss, eps (of training), seed,
            samples, run; clean, pgd (None without an attack) and verified, as fractions.
    """

    runs: list[Row]

    def rows(self) -> list[Row]:
        """The runs, accuracies in percent."""
        return [
            {key: row[key] for key in ("loss", "eps", "seed", "samples", "run")}
            | {f"{key} %": None if row[key] is None else 100 * row[key] for key in ("clean", "pgd", "verified")}
            for row in self.runs
        ]

    def losses(self) -> list[str]:
        """Names of the losses, each once."""
        return list(dict.fromkeys(row["loss"] for row in self.runs))

    def summary(self) -> str:
        """The most verified run of each loss."""
        best = [max((r for r in self.runs if r["loss"] == loss), key=_lowest) for loss in self.losses()]
        told = "; ".join(
            f"{row['loss']} trained at eps {row['eps']}: {100 * row['clean']:.1f}% clean, "
            f"{100 * _lowest(row):.1f}% {'under PGD' if row['verified'] is None else 'verified'}"
            for row in best
        )
        return f"Standard against robust accuracy of {len(self.runs)} runs. Most verified of each loss: {told}."


def read_trade_off(folder: str | Path) -> TradeOff:
    """The table of a sweep.

    Args:
        folder: Where ``lirpa-ext sweep`` wrote ``sweep.csv``.

    Raises:
        ResultsError: There is none, or it is no such table.
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
    """Verified accuracy; of a randomized network, of which nothing is verified, PGD's."""
    return float(row["pgd"] if row["verified"] is None else row["verified"])


def plot_trade_off(result: TradeOff, axes: Axes) -> None:
    """Standard accuracy against verified accuracy, with a segment up to PGD's, one line a loss (Fig. B.4).

    Of a randomized network, of which nothing is verified, PGD's alone.
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
