"""Check that each output of a batch depends on its own sample only.

The engine and this package bound each sample of a batch over its own perturbation set. Such a bound is meaningless if
samples depend on each other (flip, cumsum, softmax or a mean over axis 0, a transposed batch, a sequence-first
recurrent layer, ...). The graph does not show this: traced with one sample, it may even be right. So the model itself
is run on batches in which some samples change; the outputs of the other samples must not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..engine.limits import is_out_of_memory
from ..errors import TraceError
from .tracing import in_dtype
from .watching import Calls, Reads

Inputs = tuple[Tensor, ...]

# Tolerance relative to the output's own scale. With equal shapes, other samples do not even change the rounding; sums
# for a sample at another place of the batch may be taken in another order.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
_ANOTHER_PLACE = 100
_CANCELLED = 1e-3  # outputs smaller than the largest by this factor may be rounding errors of large numbers that cancel
_SMALL = 4  # number of samples in a second batch
_MANY = 16  # number of samples beyond which not every pair of samples is tested
_WAY_OUT = (
    "A bound is of one sample over its own set, which such a model does not have. The first axis must be the batch's, "
    "and be left alone: use batch_first=True in recurrent and attention layers, and axes from 1 on elsewhere"
)


def check_samples_apart(model: nn.Module, inputs: Inputs) -> None:
    """Check that a sample's output does not depend on other samples, its place in the batch, or random numbers.

    The example batch and one of another size are tested. A model that fails on other batch sizes is tested on the
    example batch alone, where a single sample passes.

    Args:
        model: The model in eval mode; running it must not change it.
        inputs: Example inputs, (B, ...) each. Inputs of another length have no batch axis and are not changed.

    Raises:
        TraceError: An output depends on more than its sample, or a batch of B samples does not give B outputs.
    """
    batch = len(inputs[0])
    _check_size(model, inputs)
    if batch > 1:
        _check_apart(model, inputs)
    for size in (size for size in (_SMALL, _SMALL - 1) if size != batch):
        other = _resized(inputs, size)
        if _check_size(model, other):
            return _check_apart(model, other)


def check_batch_apart(model: nn.Module, inputs: Inputs) -> None:
    """`check_samples_apart` on the given batch alone, for graphs, which serve one batch size.

    Args:
        model: The graph.
        inputs: Example inputs, (B, ...) each.

    Raises:
        TraceError: As `check_samples_apart`.
    """
    if _check_size(model, inputs) and len(inputs[0]) > 1:
        _check_apart(model, inputs)


def _check_size(model: nn.Module, inputs: Inputs) -> bool:
    """Raise TraceError unless there are as many outputs as samples; return whether the model runs on these inputs."""
    output, batch = _run(model, inputs), len(inputs[0])
    if output is not None and (output.dim() == 0 or len(output) != batch):
        raise TraceError(
            f"{type(model).__name__} gives an output of shape {tuple(output.shape)} for a batch of {batch}: its first "
            "axis is not the batch's, or a batch size is built in (as by reshape with a number in place of "
            f"x.shape[0]). {_WAY_OUT}"
        )
    return output is not None


def _check_apart(model: nn.Module, inputs: Inputs) -> None:
    """Raise TraceError if samples depend on each other, in float64 too: in float32 alone, it may be rounding."""
    problem = _problem(model, inputs)
    double = in_dtype(model, inputs, torch.float64) if problem and inputs[0].dtype == torch.float32 else None
    if problem if double is None else _problem(*double):
        raise TraceError(problem)


def _problem(model: nn.Module, inputs: Inputs) -> str:
    """Text of how samples of this batch depend on each other, on their place, or on random numbers; else ""."""
    name = type(model).__name__
    clean = _run(model, inputs)
    with Reads(model) as reads:
        again = _run(model, inputs)
    if clean is None or again is None:
        return ""
    tolerance = _ROUNDING.get(clean.dtype, 1e-2)
    noise = _difference(again, clean, clean, _CANCELLED)
    if not noise <= _ANOTHER_PLACE * tolerance:
        return (
            f"{name} gives other outputs at every call for the same inputs: it draws random numbers or keeps a state, "
            "and no bound of one call holds for the next"
        )
    tolerance = max(tolerance, 10 * noise)
    for moved, kept in _changes(inputs, undefined=not reads.places):
        output = _run(model, moved)  # None where the model refuses such values
        if output is None or (
            output.shape == clean.shape and _difference(output[kept], clean[kept], clean) <= tolerance
        ):
            continue
        return f"samples of a batch read each other in {name}{_first_reader(model, inputs, moved, kept)}. {_WAY_OUT}"
    batched = [len(x) == len(inputs[0]) for x in inputs]
    output = _run(model, tuple(x.flip(0) if b else x for x, b in zip(inputs, batched, strict=True)))
    if output is not None and not _difference(output, clean.flip(0), clean, _CANCELLED) <= _ANOTHER_PLACE * tolerance:
        return (
            f"{name} gives other outputs for the same samples in another order: what it does to a sample depends on "
            f"the place in the batch. {_WAY_OUT}"
        )
    return ""


def _changes(inputs: Inputs, undefined: bool) -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs in which some samples are changed, and the indices of the samples that are not changed.

    NaN passes through every sum and product, whatever the weights; only sorting, comparisons and rounding hide it. For
    these, other values are tried, too.

    Args:
        inputs: Inputs, (B, ...) each.
        undefined: Whether to try NaN; not for a model that reads values in Python, which may test for NaN.
    """
    batch = len(inputs[0])
    index = torch.arange(batch, device=inputs[0].device)
    bits = range((batch - 1).bit_length())
    if batch > _MANY:
        bits = [0, 1, bits[-1]]  # type: ignore[assignment]
    for bit in bits if undefined else ():
        for changed in ((index >> bit) % 2 == 0, (index >> bit) % 2 == 1):
            yield _with_others(inputs, changed, math.nan), (~changed).nonzero().flatten()
    for changed, value in ((index == 0, 10.0), (index > 0, -10.0)):
        yield _with_others(inputs, changed, value), (~changed).nonzero().flatten()


def _with_others(inputs: Inputs, changed: Tensor, value: float) -> Inputs:
    """The inputs with `value` times about the largest entry in changed samples; whole numbers are another sample's."""
    moved = []
    for x in inputs:
        other = x.roll(1, 0) if not x.is_floating_point() else torch.full_like(x, 1.0) * (x.abs().amax() + 1) * value
        batched = len(x) == len(changed)
        moved.append(torch.where(changed.view(-1, *[1] * (x.dim() - 1)), other, x) if batched else x)
    return tuple(moved)


def _resized(inputs: Inputs, size: int) -> Inputs:
    """A batch of another size, of the same samples and, beyond them, copies with noise."""
    generator, batch = torch.Generator().manual_seed(1), len(inputs[0])
    index = torch.arange(size) % batch
    resized = []
    for x in inputs:
        rows = x[index.to(x.device)] if len(x) == batch else x
        if rows is not x and x.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            rows = torch.where(
                (torch.arange(size) < batch).view(-1, *[1] * (x.dim() - 1)).to(x.device), rows, rows + noise
            )
        resized.append(rows)
    return tuple(resized)


def _run(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """The output; None if the model fails on these inputs, or does not return one tensor."""
    try:
        output = model(*(x.clone() for x in inputs))  # copies, as the model may overwrite its inputs
    except Exception as error:  # whatever a user's model raises
        if is_out_of_memory(error):
            raise
        return None
    return output if isinstance(output, Tensor) else None


def _difference(actual: Tensor, expected: Tensor, clean: Tensor, floor: float = 0.0) -> float:
    """Largest difference relative to each output's own scale; infinite if only one of two outputs is finite.

    Args:
        actual: Outputs of some samples.
        expected: Expected outputs of the same samples.
        clean: Outputs of the whole batch, for the scale.
        floor: Least scale of an output, in units of the largest scale. Default 0.
    """
    if not clean.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), finite):
        return math.inf
    scale = torch.where(clean.isfinite(), clean.abs(), 0.0).amax(0)
    scale = torch.maximum(scale, floor * scale.amax()) if scale.numel() else scale
    off = torch.where(finite, actual - expected, 0.0).abs() / scale.clamp(min=torch.finfo(clean.dtype).tiny)
    return float(off.amax()) if off.numel() else 0.0


def _first_reader(model: nn.Module, inputs: Inputs, moved: Inputs, kept: Tensor) -> str:
    """Text that names the first torch function with other outputs for samples that did not change; "" if unknown."""
    batch = len(inputs[0])
    for before, after in zip(Calls.of(model, inputs), Calls.of(model, moved), strict=False):
        if before.name != after.name:
            break  # the model took another branch
        comparable = before.output.shape == after.output.shape and len(before.output) == batch
        if comparable and not _difference(after.output[kept], before.output[kept], before.output) <= 1e-3:
            return f", first at {before}"
    return ""
