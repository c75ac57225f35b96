"""Estimates of Fast-Lin's boxes by random projections, for training, at the cost of a few forward passes.

E. Wong, F. Schmidt, J. H. Metzen, J. Z. Kolter, Scaling provable adversarial defenses, NeurIPS 2018, 3.2. With
parallel lines, a neuron is m + sum_i g_i t_i with |t_i| <= 1 (for an l2 ball, plus h.t with ||t||_2 <= 1): one
generator g_i for each input and each unstable neuron before it. Its box is m -+ (||g||_1 + ||h||_2). For independent
standard Cauchy c_i, sum_i g_i c_i is distributed as ||g||_1 c_1, and the median of |c_1| is 1; for standard normal
c_i, sum_i h_i c_i has the mean square ||h||_2^2. Both sums are linear, so that layers map them as they map samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.ball_box import BallBox, per_sample
from ..domain.perturbation import PerturbationLpNorm
from ..engine import Node
from ..passes.slopes import ACTIVATIONS, Lines
from ..rules import RULES, AffineRule, State
from ..rules.base import apply
from .base import set_of


@dataclass(frozen=True)
class Sums:
    """A node's middle, and R random sums of its generators.

    Attributes:
        middle: m, (B, ...).
        cauchy: Sums of the generators g_i with Cauchy weights, (R, B, ...).
        normal: Sums of the generators h_i with normal weights, (R, B, ...).
    """

    middle: Tensor
    cauchy: Tensor
    normal: Tensor

    def box(self) -> BallBox:
        """The estimated box, with an infinite radius."""
        # The root of a mean square of 0 is taken to have no gradient, where torch's would be NaN.
        square = self.normal.square().mean(0)
        spread = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
        reach = self.cauchy.abs().median(0).values + spread
        radius = reach.new_full((len(reach),), torch.inf)
        return BallBox(self.middle, radius, self.middle - reach, self.middle + reach)


class Projections:
    """Random projections of a graph: the sums of each node, drawn and computed when first needed.

    Args:
        module: The graph, with the input set on it.
        count: Number R of projections.
        draw: Tensor -> uniform random numbers in [0, 1) of its shape.
    """

    def __init__(self, module: nn.Module, count: int, draw: Callable[[Tensor], Tensor]) -> None:
        self.module, self.count, self.draw = module, count, draw
        self.sums: dict[str, Sums] = {}

    def box(self, node: Node, states: dict[str, State]) -> BallBox:
        """The estimated box of a node.

        Args:
            node: The node.
            states: Sets of the nodes up to and including this node, by name.
        """
        for other in engine.ancestors_in_order(node):
            if other.perturbed and other.name not in self.sums:
                self.sums[other.name] = self._of(other, states)
        return self.sums[node.name].box()

    def _of(self, node: Node, states: dict[str, State]) -> Sums:
        inputs, own = [states[parent.name] for parent in node.inputs], set_of(states[node.name])
        if isinstance(node, engine.BoundInput) and PerturbationLpNorm.of(node.perturbation).norm == 2:
            return self._ball(own)
        if type(node).__name__ in ACTIVATIONS:
            lines, before = Lines.of(node, set_of(inputs[0])), self.sums[node.inputs[0].name]
            half = 0.5 * lines.offset  # half the height of the strip between the parallel lines
            cauchy = lines.line * before.cauchy + half * self._cauchy(half)
            return Sums(lines.line * before.middle + half, cauchy, lines.line * before.normal)
        rule, rows = RULES.get(type(node).__name__), own.center.new_zeros(1, *own.center.shape)
        if not inputs or not isinstance(rule, AffineRule) or rule.adjoint(node, inputs, rows) is None:
            return self._of_box(own)
        # The node is affine in its perturbed inputs.
        known = [self.sums[parent.name] for parent in node.inputs if parent.perturbed]

        def image(values: list[Tensor]) -> Tensor:
            rest = iter(values)
            return apply(node, inputs, lambda _: next(rest))

        constant = image([torch.zeros_like(sums.middle) for sums in known])

        def images(columns: list[Tensor]) -> Tensor:
            return torch.stack([image(list(column)) - constant for column in zip(*columns, strict=True)])

        middle = image([sums.middle for sums in known])
        return Sums(middle, images([sums.cauchy for sums in known]), images([sums.normal for sums in known]))

    def _of_box(self, state: BallBox) -> Sums:
        """Sums of a node of which only the box is known, with one generator for each element."""
        lower, upper = state.box()
        half = 0.5 * (upper - lower)
        cauchy = half * self._cauchy(half)
        return Sums(0.5 * (lower + upper), cauchy, torch.zeros_like(cauchy))

    def _ball(self, state: BallBox) -> Sums:
        """Sums of an l2 ball; a data range is ignored."""
        # Normal numbers are computed from uniform ones, so that `draw` serves both kinds of sums.
        uniform = self.draw(state.center.expand(self.count, *state.center.shape))
        tiny = torch.finfo(uniform.dtype).eps
        normal = torch.special.ndtri(uniform.clamp(tiny, 1 - tiny)) * per_sample(state.radius, state.center)
        return Sums(state.center, torch.zeros_like(normal), normal)

    def _cauchy(self, like: Tensor) -> Tensor:
        uniform = self.draw(like.expand(self.count, *like.shape))
        tiny = torch.finfo(uniform.dtype).eps
        return torch.tan(torch.pi * (uniform.clamp(tiny, 1 - tiny) - 0.5))
