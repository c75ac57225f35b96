"""Running a method of the package on a graph."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .. import engine
from ..errors import InvalidInputError, OptionError
from ..intervals import propagate_intervals
from ..norms import NormCache, PowerIteration
from ..propagation import propagate
from ..rules import Context
from ..slopes import ACTIVATIONS
from .base import Bounds, Problem, check_options, check_specification, find_method, set_of
from .bcp import LastLayer, dense_last_layer, tightened


def run_method(
    module: nn.Module,
    method: str,
    inputs: tuple[Tensor, ...],
    C: Tensor | None,
    bound_lower: bool,
    bound_upper: bool,
    options: dict[str, Any],
    cache: NormCache,
    power_iterations: dict[str, PowerIteration],
    training: bool,
    collected: list[Tensor] | None = None,
) -> Bounds:
    """Run one of the package's methods on a graph of ours or of the engine's, and free what it leaves there.

    Args:
        module: The graph.
        method: Name of the method.
        inputs: Inputs, at least one a `BoundedTensor`.
        C: Specification rows or None.
        bound_lower: Whether the lower side is asked.
        bound_upper: Whether the upper side is asked.
        options: Options of the method.
        cache: Norm bounds of the module.
        power_iterations: Power iterations of the module.
        training: Whether they may move.
        collected: Takes the clean output, if the method computes it.

    Returns:
        (lower, upper).
    """
    function = find_method(method)
    check_options(method, function, options)
    if not bound_lower and not bound_upper:
        raise OptionError("at least one of bound_lower and bound_upper must be True")
    _check_perturbed(inputs)
    try:
        engine.set_input(module, *inputs)
        if C is not None:
            outputs = math.prod(module.final_node().output_shape[1:])  # type: ignore[operator]
            check_specification(C, inputs[0], outputs)
        problem = Problem(module, C, bound_lower, bound_upper, cache, power_iterations, training)
        bounds = function(problem, **options)
        output = getattr(module.final_node(), "forward_value", None)  # type: ignore[operator]
        if collected is not None and output is not None:
            collected.append(output)
        return bounds
    finally:
        engine.free_graphs(module)


def run_activation_bounds(
    module: nn.Module, inputs: tuple[Tensor, ...], cache: NormCache, intermediate: str = "ibp"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Boxes of the inputs of the graph's ReLUs and LeakyReLUs, by the activation's name."""
    if intermediate not in ("ibp", "bcp"):
        raise OptionError(f'intermediate must be "ibp" or "bcp", got {intermediate!r}')
    _check_perturbed(inputs)
    try:
        engine.set_input(module, *inputs)
        context = Context(cache, {})
        states = propagate(module, context, True) if intermediate == "bcp" else propagate_intervals(module, context)
        order = engine.ancestors_in_order(module.final_node())  # type: ignore[operator]
        activations = [node for node in order if node.perturbed and type(node).__name__ in ACTIVATIONS]
        return {node.name: set_of(states[node.inputs[0].name]).box() for node in activations}
    finally:
        engine.free_graphs(module)


def run_last_layer(
    module: nn.Module, inputs: tuple[Tensor, ...], cache: NormCache, tighten: bool = True
) -> LastLayer | None:
    """The dense last layer with the ball and the box of "bcp" before it, or None where the output is no such layer."""
    _check_perturbed(inputs)
    try:
        engine.set_input(module, *inputs)
        problem = Problem(module, None, True, True, cache, {}, False)
        states = problem.propagate(problem.context(tighten=tighten))
        return dense_last_layer(problem, tightened(states) if tighten else states)
    finally:
        engine.free_graphs(module)


def _check_perturbed(inputs: tuple[Tensor, ...]) -> None:
    if not any(getattr(x, "ptb", None) is not None for x in inputs):
        raise InvalidInputError("no input is perturbed: wrap it in BoundedTensor(x, PerturbationLpNorm(...))")
