"""Running a method of this package on a graph, with checks before and after."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..errors import InvalidInputError, OptionError
from ..passes.ball_box import propagate
from ..passes.intervals import propagate_intervals
from ..passes.slopes import ACTIVATIONS
from ..rules import Context
from .base import (
    BoundOptions,
    BoundResult,
    Bounds,
    Graph,
    Method,
    Problem,
    check_specification,
    find_method,
    set_of,
)
from .bcp import LastLayer, dense_last_layer, tightened
from .clean_value import held


def method_of(name: str, options: dict[str, Any]) -> Method:
    """A method with its options bound, as a function of the problem alone.

    Args:
        name: Name of the method.
        options: Options by name.

    Raises:
        UnknownMethodError: There is no such method.
    """
    return functools.partial(find_method(name), **options)


def run_method(graph: Graph, method: Method, inputs: tuple[Tensor, ...], options: BoundOptions) -> BoundResult:
    """Run one of the package's methods on a graph of this package or of the engine, and free the graph's tensors.

    Args:
        graph: The graph, and its norms.
        method: The method, with its options (`method_of`).
        inputs: Inputs, (B, ...) each, at least one a `BoundedTensor`.
        options: The requested bounds.

    Returns:
        The bounds, and the records of the method.

    Raises:
        OptionError: Neither lower nor upper bounds are requested, or as by the method.
        InvalidInputError: No input is perturbed, or C has a wrong shape, type or device.
        SoundnessError: The clean value lies outside of the bounds.
    """
    check_request(inputs, options.C, options.lower, options.upper, None)
    module: Any = graph.module
    try:
        engine.set_input(module, *inputs)
        final, C = module.final_node(), options.C
        if C is not None:
            check_specification(C, inputs[0], math.prod(final.output_shape[1:]))
            options = replace(options, C=C.clone() if C.is_inference() else C)
        found = method(Problem(graph, options))
        result = found if isinstance(found, BoundResult) else BoundResult(*found)
        result = replace(result, clean=getattr(final, "forward_value", None))
        if getattr(method, "keywords", {}).get("loss_fusion"):
            return result  # bounds of the cross entropy, not of f
        recording = graph.training and any(bound is not None and bound.requires_grad for bound in result.sides)
        bounds = result.sides
        if not (result.estimate or (recording and result.clean is None)):
            bounds = held(bounds, _clean(module, result), options.C, options.method, module, recording)
        if _is_of_the_package(method) and not recording:
            bounds = _open(bounds, module)
        return replace(result, lower=bounds[0], upper=bounds[1])
    finally:
        engine.free_graphs(module)


def _clean(module: Any, result: BoundResult) -> Tensor:
    """f(x), (B, ...), computed unless the method has done so."""
    with torch.no_grad():
        return module.get_forward_value(module.final_node()) if result.clean is None else result.clean


def _is_of_the_package(method: Any) -> bool:
    return getattr(method, "func", method).__module__.partition(".")[0] == "lirpa_ext"


def _open(bounds: Bounds, module: Any) -> Bounds:
    """The bounds with NaN replaced by infinite values for samples whose clean value is finite.

    A box that leaves the domain of a function gives NaN; an infinite bound is sound, and certifies nothing. NaN of the
    model itself stays.
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
    """Check the arguments of a call.

    Args:
        inputs: Inputs of the graph, (B, ...) each.
        C: Specification rows or None.
        lower: Whether lower bounds are requested.
        upper: Whether upper bounds are requested.
        outputs: Number of outputs; None does not check C.

    Raises:
        OptionError: Neither lower nor upper bounds are requested.
        InvalidInputError: No input is perturbed, or C is as in `check_specification`.
    """
    if not lower and not upper:
        raise OptionError("at least one of bound_lower and bound_upper must be True")
    _check_perturbed(inputs)
    if C is not None and outputs is not None:
        check_specification(C, inputs[0], outputs)


def run_activation_bounds(
    graph: Graph, inputs: tuple[Tensor, ...], intermediate: str = "ibp"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Boxes of the inputs of the graph's ReLUs and LeakyReLUs.

    Args:
        graph: The graph, and its norms.
        inputs: Inputs, (B, ...) each, at least one a `BoundedTensor`.
        intermediate: "ibp" (default), or "bcp" for boxes of the ball-box propagation.

    Returns:
        (lower, upper), each (B, ...), by the activation's name in the order of the graph.

    Raises:
        OptionError: `intermediate` is unknown.
        InvalidInputError: No input is perturbed.
    """
    if intermediate not in ("ibp", "bcp"):
        raise OptionError(f'intermediate must be "ibp" or "bcp", got {intermediate!r}')
    _check_perturbed(inputs)
    module: Any = graph.module
    try:
        engine.set_input(module, *inputs)
        context = Context(graph.cache)
        states = propagate(module, context, True) if intermediate == "bcp" else propagate_intervals(module, context)
        order = engine.ancestors_in_order(module.final_node())
        activations = [node for node in order if node.perturbed and type(node).__name__ in ACTIVATIONS]
        return {node.name: set_of(states[node.inputs[0].name]).box() for node in activations}
    finally:
        engine.free_graphs(module)


def run_last_layer(graph: Graph, inputs: tuple[Tensor, ...], tighten: bool = True) -> LastLayer | None:
    """The dense last layer of a graph, with the ball and box of its input by "bcp".

    Args:
        graph: The graph, and its norms.
        inputs: Inputs, (B, ...) each, at least one a `BoundedTensor`.
        tighten: As in `lirpa_ext.methods.bcp.bcp`. Default True.

    Returns:
        The layer; None if the output is not a dense layer of one perturbed vector.

    Raises:
        InvalidInputError: No input is perturbed.
    """
    _check_perturbed(inputs)
    module: Any = graph.module
    try:
        engine.set_input(module, *inputs)
        problem = Problem(replace(graph, training=False), BoundOptions("bcp"))
        states = problem.propagate(problem.context(tighten=tighten))
        return dense_last_layer(problem, tightened(states) if tighten else states)
    finally:
        engine.free_graphs(module)


def _check_perturbed(inputs: tuple[Tensor, ...]) -> None:
    if not any(getattr(x, "ptb", None) is not None for x in inputs):
        raise InvalidInputError("no input is perturbed: wrap it in BoundedTensor(x, PerturbationLpNorm(...))")
