"""Identify the function that a model computes: a hash of its traced graph with every tensor, and a few outputs.

A state dict does not identify it: buffers that are not saved, attributes, hooks and functions change outputs too. The
traced graph contains all of them, except for the code of a single operator; the outputs reveal changes of that code.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError

SAMPLES = 8  # samples of which outputs are kept
NUMBERS = 16  # numbers kept of a sample: its outputs, or random sums of them if there are more


def model_hash(model: nn.Module, x: Tensor) -> str:
    """SHA-256 of the graph that a model is traced to, and of each parameter, buffer and constant in it.

    The hash does not depend on the device or on where the source code lies.

    Args:
        model: The model, in the mode (train or eval) in which it is used.
        x: Example inputs for the trace, (B, ...).

    Returns:
        Hexadecimal digits.

    Raises:
        TraceError: The model cannot be traced.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracer warnings; the graph is compared with the model elsewhere
            graph, _ = torch.jit._get_trace_graph(model, (x,))  # type: ignore[attr-defined]
        torch._C._jit_pass_inline(graph)
    except Exception as error:  # whatever a user's model raises
        raise TraceError(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {error}") from error
    digest = hashlib.sha256()
    for line in _lines(graph, {}):
        digest.update(line)
    return hash_tensors([*model.named_parameters(), *model.named_buffers()], digest.hexdigest())


def outputs(model: nn.Module, x: Tensor, place: Callable[[Tensor], Tensor]) -> list[list[float | None]]:
    """Outputs of a classifier at samples spread over a data set, in a form that JSON can hold.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        x: Inputs of the data set, (N, ...), of which at most `SAMPLES` are taken.
        place: Moves samples to the device and dtype of the model.

    Returns:
        For each sample its logits, or `NUMBERS` random sums of them if there are more classes; None in place of NaN and
        infinity.
    """
    chosen = torch.linspace(0, len(x) - 1, min(SAMPLES, len(x))).round().long().unique()
    with torch.no_grad():
        rows = torch.cat([model(place(x[i : i + 1])).double().cpu() for i in chosen.tolist()])
    classes = rows.shape[1]
    if classes > NUMBERS:
        mix = torch.randn(classes, NUMBERS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows = rows @ mix / classes**0.5
    return [[value if abs(value) < float("inf") else None for value in row] for row in rows.tolist()]


def agree(before: Any, now: list[list[float | None]], dtype: torch.dtype) -> bool:
    """Whether two results of `outputs` agree to half of the digits of the dtype (devices round differently).

    Args:
        before: Outputs that were read from a file; anything malformed does not agree.
        now: Outputs of the model.
        dtype: In which the outputs were computed.
    """
    try:
        rows = list(zip(before, now, strict=True))
        pairs = [(a, b) for row, other in rows for a, b in zip(row, other, strict=True)]
        scale = max((abs(b) for _, b in pairs if b is not None), default=0.0)
        most = torch.finfo(dtype).eps ** 0.5 * scale
        return all(a is b or (None not in (a, b) and abs(a - b) <= most) for a, b in pairs)
    except (TypeError, ValueError):  # other lengths, or something else was in the file
        return False


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """SHA-256, in hexadecimal digits, of a text and of named tensors: names, dtypes, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        for part in _bytes(name, tensor):
            digest.update(part)
    return digest.hexdigest()


def _lines(block: Any, numbers: dict[Any, int]) -> Iterator[bytes]:
    """The graph as bytes: kind, attributes and operands of each node; values are numbered in order of creation."""

    def number(value: Any) -> int:
        return numbers.setdefault(value.unique(), len(numbers))

    yield f"takes {[number(value) for value in block.inputs()]}".encode()
    for node in block.nodes():
        operands = [number(value) for value in node.inputs()]
        results = [(number(value), _type(value)) for value in node.outputs()]
        yield f"{results} = {node.kind()} {operands}".encode()
        if node.kind() == "prim::PythonOp":  # an autograd function with its arguments that are no tensors
            yield f"{node.pyname()} {node.scalar_args()!r}".encode()
        elif not any(kind == "Device" for _, kind in results):
            for name in sorted(node.attributeNames()):
                yield from _attribute(node, name)
        for inner in node.blocks():
            yield from _lines(inner, numbers)
    yield f"gives {[number(value) for value in block.outputs()]}".encode()


def _attribute(node: Any, name: str) -> Iterator[bytes]:
    kind = node.kindOf(name)
    value = getattr(node, kind)(name)
    if isinstance(value, Tensor):
        yield from _bytes(name, value)
    elif kind == "ts":
        for tensor in value:
            yield from _bytes(name, tensor)
    else:
        yield f"{name} {value!r}".encode()


def _type(value: Any) -> str:
    kind = value.type()
    if kind.kind() != "TensorType":
        return str(kind.kind())[:-4]
    return f"{kind.scalarType()} {kind.sizes()}"


def _bytes(name: str, tensor: Tensor) -> Iterator[Any]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    values = tensor.detach().cpu()
    values = values if values.layout == torch.strided else values.to_dense()
    yield values.contiguous().flatten().view(torch.uint8).numpy().data
