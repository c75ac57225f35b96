"""Lipschitz constants of a model, layer by layer: power-iteration estimate and sound bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.lengths import flat
from ..domain.linear_maps import LinearMap
from ..domain.norms import PowerIteration, key_of, spectral_norm_bound
from ..domain.perturbation import PerturbationLpNorm
from ..module.bounded_module import BoundedModule
from ..rules import RULES, State
from ..rules.base import only_perturbed
from ..rules.context import ITERABLE, weight_name
from ..rules.elementwise import Elementwise
from ..rules.linear import Affine, TimesConstant, differs_by_sample
from ..rules.softmax import LogSoftmax, Softmax
from ..rules.structure import Concat, Monotone, Negation, Sum

_FAR = 1e150  # stands for infinity in the ends of an activation's input, so that their products are finite


@dataclass(frozen=True)
class Layer:
    """Lipschitz constant of one node of the graph.

    Attributes:
        name: Name of the node's weight in the model; for a node without weight, the node's name and class.
        estimate: Of a linear layer, the power-iteration estimate of its spectral norm (a lower bound); else `bound`.
        bound: Upper bound on the Lipschitz constant in l2 over all inputs; infinite where none is known.
    """

    name: str
    estimate: float
    bound: float

    @property
    def ratio(self) -> float:
        """bound / estimate, an upper limit on the bound's overestimation; 1 for a layer of zeros."""
        return self.bound / self.estimate if self.estimate > 0 else (1.0 if self.bound == 0 else float("inf"))


@dataclass(frozen=True)
class LipschitzReport:
    """Lipschitz constants of a model's layers, and of the whole model.

    Attributes:
        layers: All dense and convolutional layers, and every other node whose constant is not 1: batch norms, constant
            factors, paddings that repeat values, overlapping pools, activations steeper than 1. The constant of a node
            without weights that is at most 1 (ReLU, tanh) is taken as 1.
        product: Upper bound on the model's Lipschitz constant in l2 over all inputs. Along a chain it is the product of
            the layers' bounds; the bounds of branches that are added are added, those of branches that are concatenated
            are combined as the root of the sum of squares. Infinite if no bound is known for a node (a product of
            branches, a layer normalization, exp, ...).
        estimate: The same combination of the layers' estimates; neither an upper nor a lower bound.
        chain: Whether the model is a chain, so that `product` is the product of the layers' bounds.
    """

    layers: tuple[Layer, ...]
    product: float
    estimate: float
    chain: bool

    def __str__(self) -> str:
        last = "product" if self.chain else "network"
        width = max([len(last), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'estimate':>12}  {'bound':>12}  {'ratio':>8}"]
        rows = [*self.layers, Layer(last, self.estimate, self.product)]
        lines += [f"{r.name:<{width}}  {r.estimate:>12.6g}  {r.bound:>12.6g}  {r.ratio:>8.4f}" for r in rows]
        return "\n".join(lines)


def lipschitz(
    model: nn.Module,
    x: Tensor,
    tolerance: float = 1e-6,
    max_steps: int = 2000,
    verbose: bool = True,
) -> LipschitzReport:
    """Estimate and bound the l2 Lipschitz constant of every layer and of the model, and print a table.

    The constants hold over all inputs. The bound method "lipschitz" uses the same spectral norms, but takes the slopes
    of activations on the given ball only.

    Args:
        model: The torch model.
        x: Example input, (B, ...); only its shape matters.
        tolerance: Relative change at which a power iteration counts as converged, default 1e-6.
        max_steps: Largest number of power steps for a layer, default 2000.
        verbose: Whether to print the table, default True.

    Returns:
        The report.

    Raises:
        TraceError: The engine cannot trace the model.
        InvalidInputError: A weight has NaN or infinite entries.
    """
    graph = BoundedModule(model, x)
    try:
        with torch.no_grad(), graph._computing():
            engine.set_input(graph, engine.BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.0)))
            report = _report(graph, tolerance, max_steps)
    finally:
        engine.free_graphs(graph)
    if verbose:
        print(report)
    return report


def _report(graph: BoundedModule, tolerance: float, max_steps: int) -> LipschitzReport:
    layers: list[Layer] = []
    totals: dict[str, Layer] = {}  # from the input to each node
    states: dict[str, State] = {}
    known: dict[str, object] = {}
    chain = True
    final = graph.final_node()
    for node in engine.ancestors_in_order(final):
        value = graph.get_forward_value(node)
        if not node.perturbed or engine.is_shape(node):
            states[node.name] = value
            continue
        states[node.name] = BallBox(value, value.new_zeros(value.shape[:1]))
        if isinstance(node, engine.BoundInput):
            totals[node.name] = Layer(node.name, 1.0, 1.0)
            continue
        inputs = [states[parent.name] for parent in node.inputs]
        before = [totals[parent.name] for parent, s in zip(node.inputs, inputs, strict=True) if isinstance(s, BallBox)]
        if len(before) == 1:
            layer, listed = _layer(node, inputs, value, known, tolerance, max_steps)
            layers += [layer] if listed else []
            totals[node.name] = _scaled(before[0], layer)
        else:
            chain = False
            totals[node.name] = _joined(node, inputs, value, before)
            if math.isinf(totals[node.name].bound):
                layers.append(_unbounded(node))
    total = totals.get(final.name, Layer(final.name, 0.0, 0.0))
    return LipschitzReport(tuple(layers), total.bound, total.estimate, chain)


def _layer(
    node: Any, inputs: list[State], value: Tensor, known: dict[str, object], tolerance: float, max_steps: int
) -> tuple[Layer, bool]:
    """Lipschitz constant of a node in its only perturbed input, and whether the report lists the node."""
    rule, index = RULES.get(type(node).__name__), only_perturbed(inputs)
    assert index is not None
    state = inputs[index]
    assert isinstance(state, BallBox)
    if isinstance(rule, Affine):
        constant = inputs[1 - index] if isinstance(rule, TimesConstant) else None
        if isinstance(constant, Tensor) and differs_by_sample(constant, state.center, value):
            own = rule.own(node, constant, state, index, value)  # type: ignore[attr-defined]
            return _fixed(node, math.inf if own is None else float(own.norms.max()))
        linear_map = rule.linear_map(node, inputs, index)
        fits = linear_map is not None and len(value) == len(state.center) and linear_map.output_shape == value.shape[1:]
        if linear_map is None or not fits:
            return _unbounded(node), True
        return _of_map(node, linear_map, known, tolerance, max_steps)
    factor: float | None = None
    if isinstance(rule, Elementwise) and index == 0 and value.shape == state.center.shape:
        ends = [torch.full_like(state.center, end, dtype=torch.float64) for end in (-_FAR, _FAR)]
        slope = rule.slope(node, *ends)
        factor = float(torch.where(slope.isfinite() & (slope < _FAR), slope, math.inf).amax())
    elif isinstance(rule, Monotone):
        factor = rule.factor(node, state, value)
    elif isinstance(rule, Negation | Softmax):
        factor = 1.0
    elif isinstance(rule, LogSoftmax):
        factor = math.sqrt(value.shape[node.axis])
    return _fixed(node, math.inf if factor is None else factor)


def _of_map(
    node: Any, linear_map: LinearMap, known: dict[str, object], tolerance: float, max_steps: int
) -> tuple[Layer, bool]:
    name = key_of(weight_name(node), linear_map, known)
    full = linear_map.double()
    bound = float(spectral_norm_bound(full).value)
    estimate = float(PowerIteration(full).converge(full, tolerance, max_steps).value)
    named = name if name != node.name else _named(node)
    return Layer(named, estimate, bound), isinstance(linear_map, ITERABLE) or abs(bound - 1) > 1e-9


def _fixed(node: Any, factor: float) -> tuple[Layer, bool]:
    """A constant known in closed form (raised to at least 1), and whether the report lists the node."""
    factor = max(factor, 1.0)
    return Layer(_named(node), factor, factor), factor > 1


def _unbounded(node: Any) -> Layer:
    return Layer(_named(node), math.inf, math.inf)


def _named(node: Any) -> str:
    return f"{node.name} ({type(node).__name__})"


def _joined(node: Any, inputs: list[State], value: Tensor, before: list[Layer]) -> Layer:
    """Constant of the map from the model's input to a node with several perturbed inputs."""
    rule = RULES.get(type(node).__name__)
    sets = [state for state in inputs if isinstance(state, BallBox)]
    if isinstance(rule, Concat) and len(value) == len(sets[0].center):
        return Layer(node.name, math.hypot(*(b.estimate for b in before)), _up(math.hypot(*(b.bound for b in before))))
    aligned = all(state.center.dim() == value.dim() and len(state.center) == len(value) for state in sets)
    if isinstance(rule, Sum) and aligned:
        copies = [math.sqrt(flat(value).shape[1] / flat(state.center).shape[1]) for state in sets]
        estimate, bound = 0.0, 0.0
        for times, layer in zip(copies, before, strict=True):
            estimate, bound = estimate + times * layer.estimate, _up(bound + _up(times * layer.bound))
        return Layer(node.name, estimate, bound)
    return _unbounded(node)


def _scaled(before: Layer, layer: Layer) -> Layer:
    """Constant of `before` followed by `layer`; a factor 0 gives 0 even if the other factor is infinite."""
    estimate, bound = (
        0.0 if 0.0 in pair else pair[0] * pair[1]
        for pair in ((before.estimate, layer.estimate), (before.bound, layer.bound))
    )
    return Layer(layer.name, estimate, _up(bound) if layer.bound != 1 else bound)


def _up(value: float) -> float:
    return math.nextafter(value, math.inf) if value else value
