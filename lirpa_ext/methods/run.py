"""Running a method of the package on a graph."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.norms import NormCache, PowerIteration
from ..errors import InvalidInputError, OptionError
from ..passes.ball_box import propagate
from ..passes.intervals import propagate_intervals
from ..passes.slopes import ACTIVATIONS
from ..rules import Context
from .base import Bounds, Method, Problem, check_specification, find_method, set_of
from .bcp import LastLayer, dense_last_layer, tightened
from .clean_value import held


def method_of(name: str, options: dict[str, Any]) -> Method:
    """A method with its options."""
    return functools.partial(find_method(name), **options)


def run_method(
    module: nn.Module,
    name: str,
    function: Method,
    inputs: tuple[Tensor, ...],
    C: Tensor | None,
    bound_lower: bool,
    bound_upper: bool,
    cache: NormCache,
    power_iterations: dict[str, PowerIteration],
    training: bool,
    collected: list[Tensor] | None = None,
) -> Bounds:
    """Run one of the package's methods on a graph of ours or of the engine's, and free what it leaves there.

    Args:
        module: The graph.
        name: Name of the method, for messages.
        function: The method, with its options (`method_of`).
        inputs: Inputs, at least one a `BoundedTensor`.
        C: Specification rows or None.
        bound_lower: Whether the lower side is asked.
        bound_upper: Whether the upper side is asked.
        cache: Norm bounds of the module.
        power_iterations: Power iterations of the module.
        training: Whether they may move.
        collected: Takes the clean output, if the method computes it.

    Returns:
        (lower, upper).

    Raises:
        SoundnessError: The clean value lies outside of the bounds.
    """
    check_request(inputs, C, bound_lower, bound_upper, None)
    try:
        engine.set_input(module, *inputs)
        final: Any = module.final_node()  # type: ignore[operator]
        if C is not None:
            check_specification(C, inputs[0], math.prod(final.output_shape[1:]))
            C = C.clone() if C.is_inference() else C
        bounds = function(Problem(module, C, bound_lower, bound_upper, cache, power_iterations, training))
        output = getattr(final, "forward_value", None)
        if collected is not None and output is not None:
            collected.append(output)
        if getattr(function, "keywords", {}).get("loss_fusion"):
            return bounds  # of the cross entropy
        recording = training and any(bound is not None and bound.requires_grad for bound in bounds)
        bounds = _guarded(module, bounds, output, C, name, recording)
        ours = getattr(function, "func", function).__module__.partition(".")[0] == "lirpa_ext"
        return _open(bounds, module) if ours and not recording else bounds
    finally:
        engine.free_graphs(module)


def _guarded(
    module: Any, bounds: Bounds, output: Tensor | None, C: Tensor | None, name: str, recording: bool
) -> Bounds:
    """The bounds after the guard on the clean value; in training only where the method computed that on its way."""
    context = getattr(module, "last_context", None)
    if (recording and output is None) or (context is not None and context.estimate):
        return bounds
    with torch.no_grad():
        clean = module.get_forward_value(module.final_node()) if output is None else output
    return held(bounds, clean, C, name, module, recording)


def _open(bounds: Bounds, module: Any) -> Bounds:
    """NaN of a box that leaves the domain of a function becomes infinite where the clean value is a number.

    A bound that says nothing is true, and certifies nothing. NaN that a user's method gives, or the model, stays.
    """
    if not any(bound is not None and bool(bound.isnan().any()) for bound in bounds):
        return bounds
    with torch.no_grad():
        clean = module.get_forward_value(module.final_node())
    defined = clean.reshape(len(clean), -1).isfinite().all(1)

    def side(bound: Tensor | None, end: float) -> Tensor | None:
        if bound is None:
            return None
        return bound.masked_fill(bound.isnan() & defined.view(-1, *[1] * (bound.dim() - 1)), end)

    return side(bounds[0], -math.inf), side(bounds[1], math.inf)


def check_request(inputs: tuple[Tensor, ...], C: Tensor | None, lower: bool, upper: bool, outputs: int | None) -> None:
    """Raise OptionError or InvalidInputError for a call that asks for nothing, perturbs nothing, or has a wrong C.

    Args:
        inputs: Of the graph.
        C: Specification rows or None.
        lower: Whether the lower side is asked.
        upper: Whether the upper side is asked.
        outputs: Number of outputs, or None to leave C alone.
    """
    if not lower and not upper:
        raise OptionError("at least one of bound_lower and bound_upper must be True")
    _check_perturbed(inputs)
    if C is not None and outputs is not None:
        check_specification(C, inputs[0], outputs)


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
