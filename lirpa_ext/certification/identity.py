"""Which function a model is: a hash of its traced graph with every tensor, and its outputs at a few samples.

A state dict does not tell: buffers that are not saved, attributes, hooks and functions decide outputs too. All of them
are in the graph that the model is traced to, but for what runs inside one operator; that shows in the outputs.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError

SAMPLES = 8  # at which outputs are kept
NUMBERS = 16  # of each sample: its outputs, or as many random sums of them


def model_hash(model: nn.Module, x: Tensor) -> str:
    """SHA-256 of the graph that a model is traced to, and of each parameter, buffer and constant in it.

    The device and the place of the source code do not count.

    Args:
        model: In the mode in which it is used.
        x: A batch, (B, ...).

    Raises:
        TraceError: The model cannot be traced.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what a trace fixes; the graph is held against the model elsewhere
            graph, _ = torch.jit._get_trace_graph(model, (x,))  # type: ignore[attr-defined]
        torch._C._jit_pass_inline(graph)
    except Exception as error:  # whatever a user's model raises
        raise TraceError(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {error}") from error
    digest = hashlib.sha256()
    for line in _lines(graph, {}):
        digest.update(line)
    return hash_tensors([*model.named_parameters(), *model.named_buffers()], digest.hexdigest())


def outputs(model: nn.Module, x: Tensor, place: Callable[[Tensor], Tensor]) -> list[list[float | None]]:
    """What a classifier gives for samples spread over a data set: `NUMBERS` numbers each, None for NaN and infinity.

    Args:
        model: (B, ...) -> (B, classes).
        x: The data set, of which `SAMPLES` are taken.
        place: Gives samples the device and dtype of the model.
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
    """Whether two `outputs` are of one function: to half of the digits of the dtype, for devices round differently."""
    try:
        rows = list(zip(before, now, strict=True))
        pairs = [(a, b) for row, other in rows for a, b in zip(row, other, strict=True)]
        scale = max((abs(b) for _, b in pairs if b is not None), default=0.0)
        most = torch.finfo(dtype).eps ** 0.5 * scale
        return all(a is b or (None not in (a, b) and abs(a - b) <= most) for a, b in pairs)
    except (TypeError, ValueError):  # of other lengths, or something else was on file
        return False


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """SHA-256 of a text and of named tensors: names, dtypes, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        for part in _bytes(name, tensor):
            digest.update(part)
    return digest.hexdigest()


def _lines(block: Any, numbers: dict[Any, int]) -> Iterator[bytes]:
    """A graph in words: each node's kind, attributes and operands, numbered in the order in which they are made."""

    def number(value: Any) -> int:
        return numbers.setdefault(value.unique(), len(numbers))

    yield f"takes {[number(value) for value in block.inputs()]}".encode()
    for node in block.nodes():
        operands = [number(value) for value in node.inputs()]
        results = [(number(value), _type(value)) for value in node.outputs()]
        yield f"{results} = {node.kind()} {operands}".encode()
        if node.kind() == "prim::PythonOp":  # an autograd function, and its plain arguments
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
