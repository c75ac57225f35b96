"""Scatter of the loss gradients of a randomized model: Fig. 2.4, 2.6 and 2.9 of S. Lee's dissertation (2021)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import InvalidInputError
from ...randomized.graddiv import cosines, gradients, mean_resultant_length, von_mises_fisher
from ...reporting.plots import style
from ...reporting.results import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Concentrations",
    "CosineMatrix",
    "GradientScatter",
    "concentrations",
    "cosine_matrix",
    "gradient_scatter",
    "plot_concentrations",
    "plot_cosines",
    "plot_scatter",
]

_MOST_ROWS = 1024  # samples times draws in a batch


@dataclass(frozen=True)
class GradientScatter(Result):
    """Result of `gradient_scatter`: directions of gradients, projected onto a plane (Fig. 2.4).

    Attributes:
        points: Model -> coordinates of its n directions, (n, 2), within the unit circle.
        means: Model -> coordinates of the mean direction, (2,).
        lengths: Model -> length of the mean direction before the projection, the mean resultant length rho.
    """

    points: dict[str, list[tuple[float, float]]]
    means: dict[str, tuple[float, float]]
    lengths: dict[str, float]

    def rows(self) -> list[Row]:
        """One row for each model: rho, and the coordinates of the mean."""
        return [
            {"model": name, "draws": len(self.points[name]), "rho": self.lengths[name], "mean_1": a, "mean_2": b}
            for name, (a, b) in self.means.items()
        ]

    def details(self) -> list[Row]:
        """One row for each gradient."""
        return [
            {"model": name, "draw": number, "coordinate_1": a, "coordinate_2": b}
            for name, points in self.points.items()
            for number, (a, b) in enumerate(points)
        ]

    def summary(self) -> str:
        """The mean resultant length of each model, in words."""
        told = ", ".join(f"{length:.4g} ({name})" for name, length in self.lengths.items())
        return f"Gradients of one sample, projected onto a plane; mean resultant length {told}."


def gradient_scatter(
    models: Mapping[str, nn.Module], x: Tensor, y: Tensor, draws: int = 100, seed: int = 0
) -> GradientScatter:
    """Directions of the loss gradients at one sample, projected onto a plane to compare their means (Fig. 2.4).

    The plane is spanned by the mean directions of the first two models, so that their lengths are kept. For a single
    model, or parallel means, it is spanned by the mean of the first model and the direction in which its gradients vary
    most.

    Args:
        models: Name -> randomized classifier, (B, ...) -> (B, classes).
        x: The sample, (...).
        y: Label of the sample, 0-dim.
        draws: Gradients of each model, default 100.
        seed: Seed of the draws, the same for all models; default 0.

    Raises:
        InvalidInputError: There is no model, a model is not randomized, or `draws` is below 2.
    """
    sampled = {name: _of_one(model, x, y, draws, seed) for name, model in _checked(models).items()}
    tiny = torch.finfo(torch.float64).tiny
    directions = {name: nn.functional.normalize(some[:, 0], dim=1, eps=tiny) for name, some in sampled.items()}
    first, *rest = (some.mean(0) for some in directions.values())
    basis: list[Tensor] = []
    residuals = next(iter(directions.values())) - first
    varies = torch.linalg.svd(residuals, full_matrices=False).Vh[0]
    for vector in (first, *rest[:1], varies, residuals[0]):
        for other in basis:
            vector = vector - (vector @ other) * other
        if len(basis) < 2 and vector.norm() > 1e-6:
            basis.append(vector / vector.norm())
    plane = torch.stack([*basis, *[torch.zeros_like(first)] * (2 - len(basis))], dim=1)
    projected = {name: some @ plane for name, some in directions.items()}
    return GradientScatter(
        {name: [(float(a), float(b)) for a, b in some] for name, some in projected.items()},
        {name: (float(some.mean(0)[0]), float(some.mean(0)[1])) for name, some in projected.items()},
        {name: float(mean_resultant_length(some)) for name, some in sampled.items()},
    )


def plot_scatter(result: GradientScatter, axes: Axes) -> None:
    """Plot the directions as dots in the unit circle, and a line from the center to each mean.

    Args:
        result: Result of `gradient_scatter`.
        axes: Axes to draw on.
    """
    angles = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(angles.cos().tolist(), angles.sin().tolist(), color="#888888", linewidth=0.8)
    for number, (name, points) in enumerate(result.points.items()):
        line = style(number)
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=9, alpha=0.5, color=line["color"], marker=line["marker"])
        mean = result.means[name]
        label = f"{name}, ρ = {result.lengths[name]:.3f}"
        axes.plot([0, mean[0]], [0, mean[1]], color=line["color"], linestyle=line["linestyle"], label=label)
    axes.set(aspect="equal", xlabel="first coordinate", ylabel="second coordinate")
    axes.legend(fontsize="small", loc="lower left")


@dataclass(frozen=True)
class CosineMatrix(Result):
    """Result of `cosine_matrix`: cosines of all pairs of gradients of one sample (Fig. 2.9).

    Attributes:
        cosines: Model -> matrix of cosines of its n gradients, (n, n).
    """

    cosines: dict[str, list[list[float]]]

    def rows(self) -> list[Row]:
        """One row for each model: mean, least and largest cosine of two different gradients."""
        return [{"model": name, "draws": len(matrix), **_spread(matrix)} for name, matrix in self.cosines.items()]

    def details(self) -> list[Row]:
        """One row for each entry of a matrix."""
        return [
            {"model": name, "row": i, "column": j, "cosine": value}
            for name, matrix in self.cosines.items()
            for i, line in enumerate(matrix)
            for j, value in enumerate(line)
        ]

    def summary(self) -> str:
        """The mean cosine of each model, in words."""
        told = ", ".join(f"{row['mean']:.4g} ({row['model']})" for row in self.rows())
        return f"Cosines of all pairs of loss gradients of one sample; mean of different pairs {told}."


def cosine_matrix(
    models: Mapping[str, nn.Module], x: Tensor, y: Tensor, draws: int = 100, seed: int = 0
) -> CosineMatrix:
    """Cosines of all pairs of loss gradients at one sample (Fig. 2.9).

    Args:
        models: Name -> randomized classifier, (B, ...) -> (B, classes).
        x: The sample, (...).
        y: Label of the sample, 0-dim.
        draws: Gradients of each model, default 100.
        seed: Seed of the draws, the same for all models; default 0.

    Raises:
        InvalidInputError: There is no model, a model is not randomized, or `draws` is below 2.
    """
    found = {name: cosines(_of_one(model, x, y, draws, seed)) for name, model in _checked(models).items()}
    return CosineMatrix({name: matrix[0].tolist() for name, matrix in found.items()})


def plot_cosines(result: CosineMatrix, axes: Axes, model: str | None = None) -> None:
    """Plot the matrix of one model as an image.

    Args:
        result: Result of `cosine_matrix`.
        axes: Axes to draw on.
        model: Name of the model, default the first.
    """
    name = next(iter(result.cosines)) if model is None else model
    image = axes.imshow(result.cosines[name], cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set(title=name, xlabel="draw", ylabel="draw")
    axes.figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)


@dataclass(frozen=True)
class Concentrations(Result):
    """Result of `concentrations`: concentration of the gradients of every sample (Fig. 2.6).

    Attributes:
        draws: Gradients of each sample.
        rho: Model -> mean resultant length of each sample.
        printed: Model -> estimate kappa-hat of each sample as printed in (2.2.10) of Lee (2021).
        banerjee: Model -> estimate kappa-hat of each sample by A. Banerjee et al. (2005).
    """

    draws: int
    rho: dict[str, list[float]]
    printed: dict[str, list[float]]
    banerjee: dict[str, list[float]]

    def rows(self) -> list[Row]:
        """One row for each model: means and medians over the samples."""
        return [
            {
                "model": name,
                "samples": len(self.rho[name]),
                "draws": self.draws,
                "rho": statistics.fmean(self.rho[name]),
            }
            | {f"kappa_{form}": statistics.fmean(getattr(self, form)[name]) for form in ("printed", "banerjee")}
            | {f"median_{form}": statistics.median(getattr(self, form)[name]) for form in ("printed", "banerjee")}
            for name in self.rho
        ]

    def details(self) -> list[Row]:
        """One row for each model and sample."""
        return [
            {"model": name, "sample": i, "rho": rho, "kappa_printed": self.printed[name][i]}
            | {"kappa_banerjee": self.banerjee[name][i]}
            for name, values in self.rho.items()
            for i, rho in enumerate(values)
        ]

    def summary(self) -> str:
        """The median kappa-hat of each model, in words."""
        told = ", ".join(f"{row['median_printed']:.4g} ({row['model']})" for row in self.rows())
        return f"Density of the estimated concentration of each sample's gradients; median kappa-hat {told}."


def concentrations(
    models: Mapping[str, nn.Module], x: Tensor, y: Tensor, draws: int = 100, seed: int = 0
) -> Concentrations:
    """Concentration of the loss gradients of each sample over many draws (Fig. 2.6).

    Args:
        models: Name -> randomized classifier, (B, ...) -> (B, classes).
        x: Samples, (B, ...).
        y: Labels, (B,).
        draws: Gradients of each sample, default 100.
        seed: Seed of the draws, the same for all models; default 0.

    Raises:
        InvalidInputError: There is no model, a model is not randomized, or `draws` is below 2.
    """
    found: dict[str, dict[str, list[float]]] = {"rho": {}, "printed": {}, "banerjee": {}}
    for name, model in _checked(models).items():
        generator, some = torch.Generator().manual_seed(seed), []
        together = max(1, _MOST_ROWS // max(1, draws))
        for points, labels in zip(x.split(together), y.split(together), strict=True):
            some.append(von_mises_fisher(_gradients(model, points, labels, draws, generator)))
        for form, values in found.items():
            values[name] = torch.cat([getattr(part, form) for part in some]).tolist()
    return Concentrations(draws, found["rho"], found["printed"], found["banerjee"])


def plot_concentrations(result: Concentrations, axes: Axes, form: str = "printed") -> None:
    """Plot the density of a concentration measure over the samples, one histogram for each model.

    Args:
        result: Result of `concentrations`.
        axes: Axes to draw on.
        form: "printed" (default), "banerjee", or "rho".
    """
    label = "mean resultant length ρ" if form == "rho" else f"estimated concentration κ ({form})"
    densities(getattr(result, form), axes, label)


def densities(values: Mapping[str, Sequence[float]], axes: Axes, label: str) -> None:
    """Plot histograms of several models over the same bins, as densities.

    Args:
        values: Model -> values.
        axes: Axes to draw on.
        label: Label of the horizontal axis.
    """
    import numpy as np

    edges = np.histogram_bin_edges(np.concatenate([np.asarray(some) for some in values.values()]), bins=30)
    for number, (name, some) in enumerate(values.items()):
        line = style(number, markers=False)
        density, _ = np.histogram(some, bins=edges, density=True)
        axes.stairs(density, edges, color=line["color"], linestyle=line["linestyle"], linewidth=1.5, label=name)
        axes.stairs(density, edges, color=line["color"], alpha=0.15, fill=True)
    axes.set(xlabel=label, ylabel="density", ylim=(0, None))
    axes.legend(fontsize="small")


def _gradients(model: nn.Module, x: Tensor, y: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Loss gradients of n = `draws` new draws, (n, B, d)."""
    if draws < 2:
        raise InvalidInputError(f"directions scatter from 2 draws on, got draws = {draws}")
    return gradients(model, x, y, draws, generator, create_graph=False)


def _of_one(model: nn.Module, x: Tensor, y: Tensor, draws: int, seed: int) -> Tensor:
    """Loss gradients at one sample, (n, 1, d), in float64."""
    return _gradients(model, x.unsqueeze(0), y.reshape(1), draws, torch.Generator().manual_seed(seed)).double()


def _checked(models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    if not models:
        raise InvalidInputError("give at least one model")
    return models


def _spread(matrix: list[list[float]]) -> Row:
    """Mean, least and largest entry off the diagonal."""
    others = [value for i, line in enumerate(matrix) for j, value in enumerate(line) if i != j]
    return {"mean": statistics.fmean(others), "min": min(others), "max": max(others)}
