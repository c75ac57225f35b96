"""The context of a propagation: norms, switches, and records of what its rules did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .. import engine
from ..domain.convolutions import Conv, ConvTranspose
from ..domain.linear_maps import Dense, LinearMap
from ..domain.norms import NormCache, PowerIteration, key_of
from ..domain.products import Product
from ..engine import Node

ITERABLE = (Dense, Conv, ConvTranspose, Product)  # maps whose norms may be estimated by a power iteration


@dataclass
class Context:
    """Norms and switches that all rules of one propagation share, and records of what they did.

    Attributes:
        cache: Upper bounds on spectral norms, by the weight's name.
        power_iterations: Persistent power iterations, by the weight's name; the propagation adds missing ones.
        estimate: Use power iterations instead of norm bounds, for training; the result is then no certificate.
        power_steps: Power steps at each call, in training mode.
        training: Whether the power iterations take steps.
        ball_only: Propagate no boxes (the Lipschitz-margin baseline).
        tighten: Use row norms that take account of zero padding, and rho <- min(rho, radius of the box) before each
            use of a ball.
        outward: Enlarge sets to cover floating-point errors (`lirpa_ext.domain.rounding`).
        fallbacks: Class of each node that no rule could bound, by node name; filled by the propagation.
        ended: Reason why coefficient rows ended early at a node, by node name; filled by the backward pass.
        norms: Norm that was used for each linear node, 0-dim, by the weight's name; filled by the propagation.
        geometries: Geometry of each linear map, by key (`lirpa_ext.domain.norms.key_of`); filled by the propagation.
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
        """Spectral norm of a node's linear part, also recorded in `norms`.

        Args:
            node: The node.
            linear_map: Linear part of the node.

        Returns:
            0-dim: an upper bound, or with `estimate` a lower estimate for maps that can be iterated on.
        """
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
    """Name under which a node's norm is kept: the name of its weight in the user's model, else that of the node.

    Args:
        node: A linear node.
        index: Index of the data among the node's inputs; None (default) takes the perturbed inputs as data.
    """
    data = [parent.perturbed if index is None else i == index for i, parent in enumerate(node.inputs)]
    weights = [parent for parent, is_data in zip(node.inputs, data, strict=True) if not is_data]
    while weights:  # a weight may pass through a transpose first
        parent = weights.pop(0)
        if isinstance(parent, (engine.BoundParams, engine.BoundBuffers)):
            return parent.ori_name
        weights += parent.inputs
    return node.name
