"""Lipschitz constants of a model, layer by layer: power-iteration estimate and sound bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import engine
from .module import BoundedModule
from .norms import PowerIteration, spectral_norm_bound
from .rules.linear import power_iterable


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: Name of its weight in the model.
        estimate: Power-iteration estimate of the spectral norm, a lower bound of it.
        bound: Sound upper bound.
    """

    name: str
    estimate: float
    bound: float

    @property
    def ratio(self) -> float:
        """bound / estimate: how much the bound may overestimate; 1 for a layer of zeros."""
        return self.bound / self.estimate if self.estimate > 0 else (1.0 if self.bound == 0 else float("inf"))


@dataclass(frozen=True)
class LipschitzReport:
    """Norms of all linear layers. `product` and `estimate` multiply them, as for a chain with 1-Lipschitz activations.

    A network with branches, or with activations steeper than 1, is not such a chain: `method="lipschitz"` follows the
    real graph.
    """

    layers: tuple[Layer, ...]

    @property
    def product(self) -> float:
        """Product of the layers' upper bounds."""
        return float(torch.tensor([layer.bound for layer in self.layers], dtype=torch.float64).prod())

    @property
    def estimate(self) -> float:
        """Product of the layers' estimates."""
        return float(torch.tensor([layer.estimate for layer in self.layers], dtype=torch.float64).prod())

    def __str__(self) -> str:
        width = max([len("product"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'estimate':>12}  {'bound':>12}  {'ratio':>8}"]
        rows = [*self.layers, Layer("product", self.estimate, self.product)]
        lines += [f"{r.name:<{width}}  {r.estimate:>12.6g}  {r.bound:>12.6g}  {r.ratio:>8.4f}" for r in rows]
        return "\n".join(lines)


def lipschitz(
    model: nn.Module,
    x: Tensor,
    tolerance: float = 1e-6,
    max_steps: int = 2000,
    verbose: bool = True,
) -> LipschitzReport:
    """Spectral norm of every dense and convolutional layer, estimated and bounded; prints the table.

    Args:
        model: The torch model.
        x: Example input, (B, ...), for the shapes.
        tolerance: Relative change at which a power iteration counts as converged.
        max_steps: Most power steps a layer.
        verbose: Print the table.

    Returns:
        The report.

    Raises:
        TraceError: The engine cannot trace the model.
    """
    graph = BoundedModule(model, x)
    layers = []
    with torch.no_grad():
        for node in engine.ancestors_in_order(graph.final_node()):
            found = power_iterable(node)
            if found is None:
                continue
            name, weight, linear_map = found
            full = linear_map(engine.constant(weight).double())
            iteration = PowerIteration(full)
            estimate = iteration.converge(full, tolerance, max_steps).value
            layers.append(Layer(name, float(estimate), float(spectral_norm_bound(full).value)))
    report = LipschitzReport(tuple(layers))
    if verbose:
        print(report)
    return report
