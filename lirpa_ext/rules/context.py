"""What a propagation shares among its rules, and writes down on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .. import engine
from ..domain.linear_maps import Conv, ConvTranspose, Dense, LinearMap
from ..domain.norms import NormCache, PowerIteration, key_of
from ..domain.products import Product
from ..engine import Node

ITERABLE = (Dense, Conv, ConvTranspose, Product)  # maps whose norm training estimates by a power iteration


@dataclass
class Context:
    """What a propagation shares among its rules.

    Attributes:
        cache: Upper bounds on spectral norms, by the weight's name.
        power_iterations: Persistent power iterations, by the weight's name; new ones are added.
        estimate: Use the power iteration (training) in place of the bound. The result is then no certificate.
        power_steps: Power steps a call, in training mode.
        training: Whether the power iterations may move.
        ball_only: Propagate no boxes (the Lipschitz-margin baseline).
        tighten: Use row norms that know the zero padding, and rho <- min(rho, radius of the box) wherever the ball is
            about to be used.
        outward: Add what floating-point arithmetic may have lost (`lirpa_ext.domain.rounding`).
        fallbacks: Names and classes of the nodes that no rule knew; filled by the propagation.
        ended: Names of the nodes at which coefficient rows ended early, and why; filled by the backward pass.
        norms: The norm that each linear node was propagated with, by name; filled by the propagation.
        geometries: Of the linear maps of those names (`lirpa_ext.domain.norms.key_of`); filled by the propagation.
    """

    cache: NormCache = field(default_factory=NormCache)
    power_iterations: dict[str, PowerIteration] = field(default_factory=dict)
    estimate: bool = False
    power_steps: int = 1
    training: bool = False
    ball_only: bool = False
    tighten: bool = True
    outward: bool = False
    fallbacks: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    geometries: dict[str, object] = field(default_factory=dict)

    def norm(self, node: Node, linear_map: LinearMap) -> Tensor:
        """Spectral norm of a node's linear part: an upper bound, or in training the estimate."""
        name = key_of(weight_name(node), linear_map, self.geometries)
        if self.estimate and isinstance(linear_map, ITERABLE):
            iteration = self.power_iterations.get(name)
            if iteration is None or iteration.geometry != self.geometries[name]:
                iteration = self.power_iterations[name] = PowerIteration(linear_map)
            iteration.train(self.training)
            value = iteration(linear_map, self.power_steps).value
        else:
            value = self.cache.bound(name, linear_map).value
        self.norms[name] = value.detach()
        return value


def weight_name(node: Node, index: int | None = None) -> str:
    """Name under which a node's norm is kept: its weight's name in the user's model, else its own.

    Args:
        node: A linear node.
        index: Of its data among its inputs; None for the perturbed ones.
    """
    data = [parent.perturbed if index is None else i == index for i, parent in enumerate(node.inputs)]
    weights = [parent for parent, is_data in zip(node.inputs, data, strict=True) if not is_data]
    while weights:  # a weight may come through a transpose
        parent = weights.pop(0)
        if isinstance(parent, (engine.BoundParams, engine.BoundBuffers)):
            return parent.ori_name
        weights += parent.inputs
    return node.name
