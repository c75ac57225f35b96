"""Randomized models under attack: Fig. 2.5, 2.7, 2.8 and A.5 and Table 2.1 of S. Lee's dissertation (2021)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...attacks import EOT, Attack
from ...certification.robust_accuracy import RobustAccuracy, correct, drawn_networks, evaluate, source_attack
from ...domain.perturbation import PerturbationLpNorm
from ...errors import InvalidInputError
from ...randomized import is_randomized
from ...randomized.sampling import require_randomized
from ...reporting.plots import style
from ...reporting.results import Result, Row, text_table
from .gradients import densities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "AccuracyStudy",
    "LossIncrease",
    "TransferMatrix",
    "accuracy_study",
    "loss_increase",
    "plot_accuracy",
    "plot_loss_increase",
    "plot_transfer",
    "transfer_matrix",
]


@dataclass(frozen=True)
class AccuracyStudy(Result):
    """Result of `accuracy_study`: accuracy of models under EOT attacks with different draws (Table 2.1, Fig. 2.7, A.5).

    Attributes:
        found: (model, draws of the attack) -> accuracies at each eps.
    """

    found: dict[tuple[str, int], RobustAccuracy]

    def rows(self) -> list[Row]:
        """One row for each model, number of draws and eps."""
        return [
            {"model": name, "attack_draws": draws} | row
            for (name, draws), accuracy in self.found.items()
            for row in accuracy.rows()
        ]

    def table(self) -> str:
        """Ensemble accuracies in percent as a text table, a column for each eps, as in Table 2.1."""
        return text_table(
            [
                {"model": name, "n": draws}
                | {f"eps {level.eps:g}": f"{100 * level.ensemble.value:.2f}" for level in accuracy.levels}
                for (name, draws), accuracy in self.found.items()
            ]
        )

    def summary(self) -> str:
        """How the accuracies were measured, in words."""
        first = next(iter(self.found.values()))
        return f"Ensemble accuracy in %, with {first.summary()}"


def accuracy_study(
    models: Mapping[str, nn.Module],
    data: tuple[Tensor, Tensor],
    eps: Sequence[float],
    draws: Sequence[int] = (5, 10, 20),
    attack: Attack | None = None,
    norm: float = math.inf,
    x_L: float | None = 0.0,
    x_U: float | None = 1.0,
    *,
    average: str = "gradients",
    keep: str | None = None,
    ensemble: int = 20,
    batch_size: int = 100,
    seed: int = 0,
) -> AccuracyStudy:
    """Accuracy over eps, for several numbers n of draws of the EOT attack.

    Args:
        models: Name -> classifier, (B, ...) -> (B, classes). A deterministic one is attacked once only.
        data: Samples, (N, ...), and labels, (N,).
        eps: Radii in units of the input; 0 gives the clean accuracy.
        draws: Numbers n of draws of each gradient, default 5, 10 and 20.
        attack: Attack inside of the EOT, default `lirpa_ext.certification.robust_accuracy.source_attack`.
        norm: p of the lp ball, default inf.
        x_L: Lower end of the data range, default 0; None for none.
        x_U: Upper end of the data range, default 1; None for none.
        average: What the EOT averages, "gradients" (default) or "outputs".
        keep: Which points the EOT keeps, "best" or "final"; default as `lirpa_ext.attacks.EOT`.
        ensemble: Number of networks drawn to judge the examples, default 20.
        batch_size: Samples at a time, default 100.
        seed: Seed of all draws, default 0.

    Raises:
        InvalidInputError: There is no model or no number of draws; or as
            `lirpa_ext.certification.robust_accuracy.evaluate`.
    """
    if not models or not draws:
        raise InvalidInputError("give at least one model, and one number of draws")
    inner = source_attack() if attack is None else attack
    found = {}
    for name, model in models.items():
        for n in dict.fromkeys(draws) if is_randomized(model) else (1,):
            found[name, n] = evaluate(
                model, data, eps, EOT(inner, n, average, keep), norm, x_L, x_U, draws=ensemble,
                batch_size=batch_size, seed=seed,
            )  # fmt: skip
    return AccuracyStudy(found)


def plot_accuracy(result: AccuracyStudy, axes: Axes, over: str = "eps") -> None:
    """Plot the ensemble accuracy with its intervals, over eps (Fig. 2.7) or over the draws of the attack (Fig. A.5).

    Args:
        result: Result of `accuracy_study`.
        axes: Axes to draw on.
        over: "eps" (default): a line for each model and number of draws; "draws": a line for each model and eps.

    Raises:
        InvalidInputError: `over` is neither.
    """
    if over not in ("eps", "draws"):
        raise InvalidInputError(f"over is 'eps' or 'draws', got {over!r}")
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for (name, draws), accuracy in result.found.items():
        for level in accuracy.levels:
            key, at = (f"{name}, n = {draws}", level.eps) if over == "eps" else (f"{name}, ε = {level.eps:g}", draws)
            value, lower, upper = (100 * part for part in level.ensemble)
            lines.setdefault(key, []).append((at, value, value - lower, upper - value))
    for number, (label, points) in enumerate(lines.items()):
        where, values, below, above = zip(*sorted(points), strict=True)
        axes.errorbar(where, values, yerr=(below, above), capsize=2, linewidth=1.3, label=label, **style(number))
    xlabel = "ε" if over == "eps" else "draws n of the attack's gradient"
    axes.set(xlabel=xlabel, ylabel="ensemble accuracy under attack, %", ylim=(0, 101))
    axes.legend(fontsize="small")


@dataclass(frozen=True)
class LossIncrease(Result):
    """Result of `loss_increase`: expected loss of each sample with and without an attack (Fig. 2.5).

    Attributes:
        clean: Model -> mean cross entropy over draws, for each sample.
        attacked: Model -> mean cross entropy over draws, for the adversarial example of each sample.
        attack: The attack, as text.
        eps: Radius of the ball.
    """

    clean: dict[str, list[float]]
    attacked: dict[str, list[float]]
    attack: str
    eps: float

    @property
    def increase(self) -> dict[str, list[float]]:
        """Model -> attacked minus clean loss, for each sample."""
        return {
            name: [after - before for before, after in zip(clean, self.attacked[name], strict=True)]
            for name, clean in self.clean.items()
        }

    def rows(self) -> list[Row]:
        """One row for each model: means over the samples, and the median increase."""
        return [
            {"model": name, "samples": len(values), "clean": statistics.fmean(self.clean[name])}
            | {"attacked": statistics.fmean(self.attacked[name]), "increase": statistics.fmean(values)}
            | {"median": statistics.median(values)}
            for name, values in self.increase.items()
        ]

    def details(self) -> list[Row]:
        """One row for each model and sample."""
        return [
            {"model": name, "sample": i, "clean": self.clean[name][i], "attacked": self.attacked[name][i]}
            | {"increase": value}
            for name, values in self.increase.items()
            for i, value in enumerate(values)
        ]

    def summary(self) -> str:
        """The mean increase of each model, in words."""
        told = ", ".join(f"{row['increase']:.4g} ({row['model']})" for row in self.rows())
        return f"Increase of the expected cross entropy under {self.attack} at eps {self.eps:g}; mean {told}."


def loss_increase(
    models: Mapping[str, nn.Module],
    data: tuple[Tensor, Tensor],
    eps: float,
    attack: Attack | None = None,
    norm: float = math.inf,
    x_L: float | None = 0.0,
    x_U: float | None = 1.0,
    *,
    draws: int = 20,
    batch_size: int = 100,
    seed: int = 0,
) -> LossIncrease:
    """Increase of the expected loss under an EOT attack.

    Theorem 2.2.1 of Lee (2021) bounds it by the mean resultant length of the gradients.

    Args:
        models: Name -> classifier, (B, ...) -> (B, classes).
        data: Samples, (N, ...), and labels, (N,).
        eps: Radius in units of the input.
        attack: The attack. Default `lirpa_ext.certification.robust_accuracy.source_attack` in an EOT of 20 draws.
        norm: p of the lp ball, default inf.
        x_L: Lower end of the data range, default 0; None for none.
        x_U: Upper end of the data range, default 1; None for none.
        draws: Networks drawn after the attack, over which both losses are averaged; default 20.
        batch_size: Samples at a time, default 100.
        seed: Seed of all draws, default 0.

    Raises:
        InvalidInputError: There is no model, or a number is out of range.
    """
    if not models or draws < 1:
        raise InvalidInputError("give at least one model, and draws of 1 or more")
    attack = EOT(source_attack()) if attack is None else attack
    losses: dict[str, tuple[list[float], list[float]]] = {}
    ball = PerturbationLpNorm(eps, norm, x_L, x_U)
    for name, model in models.items():
        generator = torch.Generator().manual_seed(seed)
        clean, attacked = losses.setdefault(name, ([], []))
        for x, y in zip(*(tensor.split(batch_size) for tensor in data), strict=True):
            points = attack(model, x, y, ball, generator).inputs
            networks = drawn_networks(model, draws, generator)
            clean += _expected_loss(networks, x, y)
            attacked += _expected_loss(networks, points, y)
    return LossIncrease(
        {name: pair[0] for name, pair in losses.items()}, {name: pair[1] for name, pair in losses.items()},
        repr(attack), float(eps),
    )  # fmt: skip


def plot_loss_increase(result: LossIncrease, axes: Axes) -> None:
    """Plot the density of the increase over the samples, one histogram for each model.

    Args:
        result: Result of `loss_increase`.
        axes: Axes to draw on.
    """
    densities(result.increase, axes, f"increase of the expected cross entropy at ε = {result.eps:g}")


@torch.no_grad()
def _expected_loss(networks: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[float]:
    losses = [functional.cross_entropy(network(x).double(), y, reduction="none") for network in networks]
    return torch.stack(losses).mean(0).tolist()


@dataclass(frozen=True)
class TransferMatrix(Result):
    """Result of `transfer_matrix`: accuracy of drawn networks on adversarial examples of each other (Fig. 2.8).

    Attributes:
        accuracy: Model -> matrix of accuracies, (networks, networks), as fractions. The row is the attacked network,
            the column the network that classifies its adversarial examples.
        attack: The attack, as text.
        eps: Radius of the ball.
        samples: Number of samples.
    """

    accuracy: dict[str, list[list[float]]]
    attack: str
    eps: float
    samples: int

    def rows(self) -> list[Row]:
        """One row for each model: mean, least and largest accuracy of other networks, and mean of the attacked ones."""
        rows = []
        for name, matrix in self.accuracy.items():
            others = [value for i, line in enumerate(matrix) for j, value in enumerate(line) if i != j]
            rows.append(
                {"model": name, "networks": len(matrix), "others": statistics.fmean(others), "min": min(others)}
                | {"max": max(others), "own": statistics.fmean(line[i] for i, line in enumerate(matrix))}
            )
        return rows

    def details(self) -> list[Row]:
        """One row for each entry of a matrix."""
        return [
            {"model": name, "attacked": i, "judge": j, "accuracy": value}
            for name, matrix in self.accuracy.items()
            for i, line in enumerate(matrix)
            for j, value in enumerate(line)
        ]

    def summary(self) -> str:
        """Mean accuracy of each model on adversarial examples of other networks, in words."""
        told = ", ".join(f"{100 * row['others']:.1f}% ({row['model']})" for row in self.rows())
        return (
            f"Accuracy of drawn networks on adversarial examples of each other, {self.attack} at eps {self.eps:g}, "
            f"{self.samples} samples; mean off the diagonal {told}."
        )


def transfer_matrix(
    models: Mapping[str, nn.Module],
    data: tuple[Tensor, Tensor],
    eps: float,
    networks: int = 50,
    attack: Attack | None = None,
    norm: float = math.inf,
    x_L: float | None = 0.0,
    x_U: float | None = 1.0,
    *,
    batch_size: int = 100,
    seed: int = 0,
) -> TransferMatrix:
    """Transfer of adversarial examples between networks drawn from the same model (Fig. 2.8).

    Args:
        models: Name -> randomized classifier, (B, ...) -> (B, classes).
        data: Samples, (N, ...), and labels, (N,).
        eps: Radius in units of the input.
        networks: Number of networks drawn from each model, default 50.
        attack: Attack on a drawn network, default `lirpa_ext.certification.robust_accuracy.source_attack`.
        norm: p of the lp ball, default inf.
        x_L: Lower end of the data range, default 0; None for none.
        x_U: Upper end of the data range, default 1; None for none.
        batch_size: Samples at a time, default 100.
        seed: Seed of all draws, default 0.

    Raises:
        InvalidInputError: There is no model, a model is not randomized, or `networks` is below 2.
    """
    if not models or networks < 2:
        raise InvalidInputError("give at least one model, and 2 or more networks")
    attack = source_attack() if attack is None else attack
    ball, (x, y) = PerturbationLpNorm(eps, norm, x_L, x_U), data
    found = {}
    for name, model in models.items():
        require_randomized(model, "transfer between drawn networks")
        generator = torch.Generator().manual_seed(seed)
        drawn = drawn_networks(model, networks, generator)
        matrix = []
        for network in drawn:
            right = torch.zeros(networks, dtype=torch.float64)
            for some, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
                points = attack(network, some, labels, ball, generator).inputs
                right += correct(drawn, points, labels)
            matrix.append((right / len(x)).tolist())
        found[name] = matrix
    return TransferMatrix(found, repr(attack), float(eps), len(x))


def plot_transfer(result: TransferMatrix, axes: Axes, model: str | None = None) -> None:
    """Plot the matrix of one model as an image; it is dark where adversarial examples transfer.

    Args:
        result: Result of `transfer_matrix`.
        axes: Axes to draw on.
        model: Name of the model, default the first.
    """
    name = next(iter(result.accuracy)) if model is None else model
    percent = [[100 * value for value in line] for line in result.accuracy[name]]
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(False)
    axes.set(title=name, xlabel="network that judges", ylabel="network attacked")
    axes.figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
