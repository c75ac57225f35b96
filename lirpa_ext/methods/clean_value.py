"""The guard on every result: the clean value must lie inside of the bounds, since x is in the perturbation set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..engine import Node
from ..errors import SoundnessError

Bounds = tuple[Tensor | None, Tensor | None]

_UNITS = 1e3  # safety factor on `rounding`, as the sums in a bound may have larger errors than those of the network


def held(bounds: Bounds, clean: Tensor, C: Tensor | None, method: str, module: nn.Module, recording: bool) -> Bounds:
    """The bounds, after a check that they contain the clean value.

    Args:
        bounds: (lower, upper), each (B, S) or of the output's shape; None for a side that was not requested.
        clean: f(x), (B, ...). Entries that are not finite are not compared.
        C: Specification rows, (B or 1, S, outputs), or None.
        method: Name of the method, for the message.
        module: The graph, with the input set on it.
        recording: Whether gradients are recorded for training. Bounds that do not hold then become NaN, which
            certifies nothing, instead of raising: that would wait for the device.

    Returns:
        (lower, upper).

    Raises:
        SoundnessError: A bound excludes the clean value by more than rounding.
    """
    with torch.no_grad():
        clean = clean.detach()
        values, size = _rows(clean, C)
        slack = torch.finfo(values.dtype).eps ** 0.5 * (1 + size)
        if any(bound is not None and bound.numel() != values.numel() for bound in bounds):
            return bounds  # a user's method may return bounds of other shapes, which are not checked
        outside = [None if bound is None else _outside(bound, values, slack, sign) for bound, sign in
                   zip(bounds, (1, -1), strict=True)]  # fmt: skip
    if recording:
        lower, upper = (
            bound if bound is None or wrong is None else torch.where(wrong, torch.nan, bound)
            for bound, wrong in zip(bounds, outside, strict=True)
        )
        return lower, upper
    if any(wrong is not None and bool(wrong.any()) for wrong in outside):
        with torch.no_grad():
            slack = slack + _UNITS * _rows(rounding(module, clean), None if C is None else C.abs())[0].abs()
        for name, bound, sign in zip(("lower", "upper"), bounds, (1, -1), strict=True):
            wrong = None if bound is None else _outside(bound, values, slack, sign)
            if wrong is not None and bool(wrong.any()):
                raise _defect(method, name, bound, values, wrong)  # type: ignore[arg-type]
    return bounds


def rounding(module: Any, clean: Tensor) -> Tensor:
    """Measured rounding errors of the outputs: their change when every node's value is changed in its last place.

    A network that cancels large numbers has small outputs and large rounding errors. The changes are random, at the
    clean point and at corners of the input's box. The last place is that of the node's largest value at all of these
    points, since a bound sums values of this size even if the node's value at the clean point is small.

    Args:
        module: The graph, with the input set on it.
        clean: f(x), (B, ...).

    Returns:
        (B, ...).
    """
    if getattr(module, "_inputs", None):
        engine.set_input(module, *module._inputs)  # the engine's forward pass drops the perturbations
    generator = torch.Generator().manual_seed(0)
    order = engine.ancestors_in_order(module.final_node())
    runs = []
    for place in (None, 0.0, 1.0, generator):
        inputs = {node.name: _place(node, place) for node in order if isinstance(node, engine.BoundInput)}
        runs.append((inputs, _values(order, inputs, clean.device)))
    sizes = {
        name: torch.stack([values[name].abs().nan_to_num(0.0, 0.0, 0.0) for _, values in runs]).amax(0)
        for name, value in runs[0][1].items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    moved = torch.zeros_like(clean)
    for k, (inputs, values) in enumerate([runs[0], *runs]):
        exact = clean if k < 2 else values[order[-1].name].view_as(clean)
        change = (_values(order, inputs, clean.device, sizes, generator)[order[-1].name].view_as(clean) - exact).abs()
        moved = torch.maximum(moved, change.nan_to_num(torch.inf if k < 2 else 0.0))
    return moved


def _values(
    order: list[Any],
    inputs: dict[str, Any],
    device: torch.device,
    sizes: dict[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Value of every node for the inputs; with `sizes`, each value is changed at random by eps times its size."""
    values: dict[str, Any] = {}
    for node in order:
        value = inputs.get(node.name)
        value = node.forward(*[values[parent.name] for parent in node.inputs]) if value is None else value
        if isinstance(value, tuple):  # a shape, which the engine also turns into a tensor
            value = torch.tensor(value, device=device)
        if sizes is not None and node.name in sizes:
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
            value = value.as_subclass(Tensor) + torch.finfo(value.dtype).eps * signs * sizes[node.name]
        values[node.name] = value
    return values


def _place(node: Node, place: float | torch.Generator | None) -> Tensor | None:
    """A corner of a perturbed input's box: the lower one (0), the upper one (1), or a random one; None for no point."""
    perturbation = getattr(node, "perturbation", None)
    if place is None or perturbation is None or not hasattr(perturbation, "box"):
        return None
    lower, upper = perturbation.box(node.value.as_subclass(Tensor))
    if isinstance(place, torch.Generator):
        side = torch.randint(0, 2, lower.shape, generator=place).to(device=lower.device, dtype=torch.bool)
        return torch.where(side, lower, upper)
    return upper if place else lower


def _rows(clean: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (B, S) of the specification rows, and the sums (B, S) of the absolute values of their terms."""
    flat = clean.reshape(len(clean), -1)
    if C is None:
        return flat, flat.abs()
    rows = C.expand(len(flat), -1, -1)
    return torch.einsum("bso,bo->bs", rows, flat), torch.einsum("bso,bo->bs", rows.abs(), flat.abs())


def _outside(bound: Tensor, values: Tensor, slack: Tensor, sign: int) -> Tensor:
    """Where a bound excludes the value by more than the slack; NaN excludes nothing."""
    excess = sign * (bound.detach().reshape(values.shape) - values)
    return (excess > slack).view_as(bound) & values.isfinite().view_as(bound)


def _defect(method: str, side: str, bound: Tensor, values: Tensor, wrong: Tensor) -> SoundnessError:
    first = int(wrong.flatten().nonzero()[0, 0])
    sample, row = divmod(first, values.shape[1])
    return SoundnessError(
        f"method {method!r} gave the {side} bound {float(bound.detach().flatten()[first]):.9g} for row {row} of sample "
        f"{sample}, whose clean value is {float(values.flatten()[first]):.9g}. This is a defect of the method, not a "
        "result; please report it with the model"
    )
