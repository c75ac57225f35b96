"""Check that the engine's graph computes the same function as the user's model.

The engine drops options of some functions, and a trace fixes the branches and numbers of the example input. So graph
and model are run on the same points, some of them in the perturbation set. Each output of each sample is compared on
the scale of that output, so that a large or undefined output does not hide differences in others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..domain.perturbation import PerturbationLpNorm
from ..engine.limits import is_out_of_memory
from ..errors import InvalidInputError, TraceError
from .tracing import in_dtype, plain
from .watching import Call, Calls

Inputs = tuple[Tensor, ...]

_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-8}  # in units of the output's own scale
_OWN_ROUNDING = 10.0  # differences up to this factor times the model's own rounding errors are allowed


@dataclass(frozen=True)
class Point:
    """Inputs at which graph and model are compared.

    Attributes:
        inputs: Inputs, (B, ...) each.
        asked: Whether the inputs are the example or in the perturbation set; at other points, the model may fail or
            be undefined.
    """

    inputs: Inputs
    asked: bool


def around(example: Inputs) -> list[Point]:
    """Points to compare at around an example: itself, its negative, normal numbers, and small normal numbers.

    Small numbers show a different or missing eps, as in a normalization.

    Args:
        example: Inputs, (B, ...) each.
    """
    generator = torch.Generator().manual_seed(0)
    noise = _floats(example, lambda x: torch.randn(x.shape, generator=generator).to(x))
    return [
        Point(example, True),
        Point(_floats(example, torch.neg), False),
        Point(noise, False),
        Point(_floats(noise, lambda x: x / 100), False),
    ]


def of_set(inputs: Inputs) -> list[Point]:
    """Points on the border of the perturbation set: two opposite random ones, and two opposite corners.

    Args:
        inputs: Inputs, (B, ...) each; those that are not perturbed stay as they are.
    """
    generator = torch.Generator().manual_seed(1)

    def moved(x: Tensor, corner: bool, sign: int) -> Tensor:
        perturbation, x = getattr(x, "ptb", None), plain(x)
        if not isinstance(perturbation, PerturbationLpNorm):
            return x
        direction = torch.randn(x.shape, generator=generator).to(x)
        return perturbation.towards(x, sign * (direction.sign() if corner else direction))

    points = []
    for corner in (False, True):
        state = generator.get_state()
        for sign in (1, -1):  # both with the same directions
            generator.set_state(state)
            points.append(Point(tuple(moved(x, corner, sign) for x in inputs), True))
    return points


def _floats(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return tuple(change(x) if x.is_floating_point() else x for x in inputs)


def check_same_function(
    graph: Callable[..., Tensor],
    values: Callable[[], Sequence[Any]],
    model: nn.Module,
    points: Sequence[Point],
    reads: Sequence[str] = (),
    defined: bool = True,
) -> None:
    """Check that graph and model compute the same outputs at some points.

    Args:
        graph: The function of the engine's graph.
        values: Returns the values of the graph's nodes after a call of `graph`.
        model: The model, in eval mode.
        points: Points to compare at.
        reads: Places at which the model reads values of tensors in Python, for the message.
        defined: Whether every output must be defined at one of the points. Default True.

    Raises:
        TraceError: Graph and model differ; the message names the first function of the model whose output no node of
            the graph has, and the likely reason. Or an output is undefined at all points, and cannot be compared.
        InvalidInputError: An output is undefined at all points, and a weight is NaN or infinite.
    """
    name = type(model).__name__
    pairs = [(point, right) for point in points if (right := _output(model, point)) is not None]
    points = [point for point, _ in pairs]
    if len({right.shape for _, right in pairs}) > 1:
        raise TraceError(f"the shape of {name}'s output depends on the values of its input, so that no graph is right")
    expected = torch.stack([right for _, right in pairs])
    if expected.dtype not in _TOLERANCE:  # whole numbers
        expected = expected.double()
    outputs = [graph(*point.inputs) for point in points]
    shapes = {tuple(output.shape) for output in outputs} - {tuple(expected.shape[1:])}
    if shapes:
        found = f"outputs of shape {min(shapes)} in place of {tuple(expected.shape[1:])}"
        _refuse(name, found, first_difference(model, points[-1].inputs, values()), reads)
    actual = torch.stack(outputs).to(expected)
    asked = torch.tensor([point.asked for point in points], device=expected.device)
    off, comparable = _difference(expected, actual, asked.view(-1, *[1] * (expected.dim() - 1)))
    if off.amax() > 1:  # compare again with the model's own rounding allowed
        rounding = _rounding(model, points, expected)
        off, comparable = _difference(expected, actual, asked.view(-1, *[1] * (expected.dim() - 1)), rounding)
    if defined and not comparable.all():
        _refuse_undefined(model)
    if off.amax() > 1:
        worst = int(off.flatten().argmax())
        inputs = points[worst // off[0].numel()].inputs
        graph(*inputs)
        found = f"{float(actual.flatten()[worst]):.6g} in place of {float(expected.flatten()[worst]):.6g}"
        _refuse(name, found, first_difference(model, inputs, values()), reads)


def _refuse_undefined(model: nn.Module) -> None:
    name = type(model).__name__
    for weight, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise InvalidInputError(f"weight {weight!r} of {name} has NaN or infinite entries")
    raise TraceError(
        f"outputs of {name} are NaN or infinite at the example input and wherever else they were compared with the "
        "engine's graph: whether the graph is right cannot be told. Build with inputs at which the model is defined"
    )


def _output(model: nn.Module, point: Point) -> Tensor | None:
    """The model's output at a point; None if the model fails at a point outside of what is bounded."""
    try:
        return model(*(x.clone() for x in point.inputs))  # copies, as the model may overwrite its inputs
    except Exception as error:  # whatever a user's model raises
        if is_out_of_memory(error):
            raise
        if point.asked:
            raise TraceError(
                f"{type(model).__name__} fails at a point of the set: {type(error).__name__}: {error}"
            ) from error
        return None


def _difference(
    expected: Tensor, actual: Tensor, asked: Tensor, rounding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Differences in units of the allowed ones, (points, B, ...), and which outputs could be compared, (...).

    At points that are asked for, the graph must be undefined where the model is.
    """
    finite, same = expected.isfinite(), (actual == expected) | (actual.isnan() & expected.isnan())
    scale = torch.where(finite, expected.abs(), 0.0).amax((0, 1))
    allowed = _TOLERANCE[expected.dtype] * scale
    if rounding is not None:
        allowed = torch.maximum(allowed, _OWN_ROUNDING * rounding)
    off = (actual - expected).abs() / allowed.clamp(min=torch.finfo(expected.dtype).tiny)
    off = torch.where(same, 0.0, torch.where(finite, off, torch.where(asked, torch.inf, 0.0))).nan_to_num(nan=torch.inf)
    return off, (finite | (same & expected.isinf())).flatten(0, 1).any(0)


def _rounding(model: nn.Module, points: Sequence[Point], expected: Tensor) -> Tensor | None:
    """Rounding error of each output of the model itself, (...); None if the model does not run in another precision.

    The error in float32 is the difference of outputs in float32 and float64; the error in float64 is taken to be
    smaller by the ratio of the machine epsilons.
    """
    single = expected.dtype == torch.float32
    dtype = torch.float64 if single else torch.float32
    other = in_dtype(model, (), dtype)
    if other is None:
        return None
    try:
        outputs = torch.stack([other[0](*_floats(point.inputs, lambda x: x.to(dtype))) for point in points])
    except Exception:  # e.g. the model creates tensors of a fixed dtype
        return None
    error = (outputs - expected).abs() * (1 if single else torch.finfo(expected.dtype).eps / torch.finfo(dtype).eps)
    return torch.where(expected.isfinite() & outputs.isfinite(), error, 0.0).amax((0, 1)).to(expected)


def _refuse(name: str, found: str, call: Call | None, reads: Sequence[str]) -> None:
    where = "" if call is None else f", first at {call}"
    raise TraceError(
        f"the engine's graph of {name} computes something else than the model (it gives {found}{where}). "
        f"{likely_reason(call, reads)}"
    )


# --- where and why -----------------------------------------------------------------------------------------------

_POOL = "The engine drops a pool's ceil_mode, dilation, count_include_pad and divisor_override"
_NORM = "auto_LiRPA 0.3 drops the eps of a normalization that it takes apart"
_BRANCH = "A trace keeps the branch and the numbers that the example input led to"
_REASONS = {"pool": _POOL, "norm": _NORM}  # by a part of the function's name


def first_difference(model: nn.Module, inputs: Inputs, values: Sequence[Any]) -> Call | None:
    """The first torch function of the model whose output depends on the inputs and is not the value of any node.

    Args:
        model: The model, in eval mode.
        inputs: Inputs at which graph and model differ, (B, ...) each.
        values: Values of the graph's nodes for these inputs.

    Returns:
        The call; None if there is none.
    """
    elsewhere = Calls.of(model, _floats(inputs, lambda x: 2 * x + 1))
    nodes = [value for value in values if isinstance(value, Tensor)]
    for call, other in zip(Calls.of(model, inputs), elsewhere, strict=False):
        if call.output.shape == other.output.shape and torch.equal(call.output, other.output):
            continue
        if not any(_alike(node, call.output) for node in nodes):
            return call
    return None


def _alike(value: Tensor, output: Tensor) -> bool:
    if value.shape != output.shape or value.dtype != output.dtype:
        return False
    finite = output.isfinite()
    scale = torch.where(finite, output.abs(), 0.0).amax() if output.numel() else output.sum()
    off = torch.where(finite, (value - output).abs(), 0.0)
    return bool((off <= _TOLERANCE.get(output.dtype, 1e-2) * scale).all())


def likely_reason(call: Call | None, reads: Sequence[str]) -> str:
    """Text of the likely reason for a difference of graph and model, and of how to avoid it.

    Args:
        call: The first function that differs, if known.
        reads: Places at which the model reads values of tensors in Python.
    """
    for part, reason in _REASONS.items():
        if call is not None and part in call.name:
            return f"{reason}: leave the option out, or write the function with others."
    if reads:
        return f"{_BRANCH}, and the forward reads values in Python at {', '.join(reads[:3])}: use torch.where."
    return (
        f"The engine computes that function otherwise. Known reasons: {_POOL[0].lower()}{_POOL[1:]}; {_NORM}; "
        f"{_BRANCH[0].lower()}{_BRANCH[1:]}. Write it with other functions."
    )
