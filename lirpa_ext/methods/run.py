"""Running a method of the package on a graph."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .. import engine
from ..errors import InvalidInputError, OptionError
from ..intervals import propagate_intervals
from ..norms import NormCache, PowerIteration
from ..rules import Context
from ..slopes import ACTIVATIONS
from .base import Bounds, Problem, check_options, check_specification, find_method, set_of


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
    module: nn.Module, inputs: tuple[Tensor, ...], cache: NormCache
) -> dict[str, tuple[Tensor, Tensor]]:
    """IBP boxes of the inputs of the graph's ReLUs and LeakyReLUs, by the activation's name."""
    _check_perturbed(inputs)
    try:
        engine.set_input(module, *inputs)
        states = propagate_intervals(module, Context(cache, {}))
        order = engine.ancestors_in_order(module.final_node())  # type: ignore[operator]
        activations = [node for node in order if node.perturbed and type(node).__name__ in ACTIVATIONS]
        return {node.name: set_of(states[node.inputs[0].name]).box() for node in activations}
    finally:
        engine.free_graphs(module)


def _check_perturbed(inputs: tuple[Tensor, ...]) -> None:
    if not any(getattr(x, "ptb", None) is not None for x in inputs):
        raise InvalidInputError("no input is perturbed: wrap it in BoundedTensor(x, PerturbationLpNorm(...))")
