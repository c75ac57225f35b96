"""ONNX networks as torch modules, checked: read, put in normal form, converted, compared with onnxruntime."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ..engine.limits import Deadline, OutOfTime, one_thread
from ..errors import InvalidInputError, OnnxError
from ..extensions import load_extensions
from .batching import add_batch_axis, add_output_axis, fold_shapes, free_batch, lacks_batch_axis
from .checking import Check, check
from .converters import convert, import_onnx2torch
from .graph import Graph
from .lowering import lower, register_lowering
from .merging import fuse
from .opsets import downgrade, upgrade
from .reading import opset_of, read_onnx
from .reference import Reference
from .selection import Selection, select, single_precision

__all__ = ["Check", "ImportedModel", "load_onnx", "register_lowering"]

_ROUNDS = 8  # of rewriting; each needs the shapes that the one before it made
_MOST_OPERATIONS = 1000  # in normal form; the engine takes 4 ms and more to build each, twice
_LEAST_SECONDS, _SECONDS_FOR_MIB = 9.0, 0.25


class ImportedModel(nn.Module):
    """A network from an ONNX file, batches of `input_shape` to batches of `output_shape`, in float32 and eval mode.

    Attributes:
        network: The torch module.
        input_name: Name of the input in the file.
        output_name: Name of the output in the file.
        input_shape: Shape of one sample.
        output_shape: Shape of its output.
        layout: "NCHW", "NHWC" or "flat": where the channels of an image are.
        opset: Version of the standard operations in the file.
        producer: The exporter, as the file tells.
        batch_size: 1 if the network takes one sample at a time; None if any number.
        rewrites: What was rewritten.
        check: How far onnxruntime, torch and the engine agree.
        reference: The original in onnxruntime, arrays in and out.
    """

    def __init__(
        self, network: nn.Module, reference: Reference, output_shape: tuple[int, ...], layout: str, opset: int,
        producer: str, batch_size: int | None, rewrites: tuple[str, ...], check: Check,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.reference = network, reference
        self.input_name, self.output_name = reference.input, reference.output
        self.input_shape, self.output_shape = reference.sample_shape, output_shape
        self.layout, self.opset, self.producer = layout, opset, producer
        self.batch_size, self.rewrites, self.check = batch_size, rewrites, check

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a batch; one by one where the network takes single samples."""
        batch, *sample = (int(size) for size in x.shape)
        if tuple(sample) != self.input_shape:
            raise InvalidInputError(
                f"the network takes (B, {', '.join(map(str, self.input_shape))}), got {(batch, *sample)}"
            )
        if self.batch_size is None or batch == self.batch_size:
            return self.network(x)
        if torch.jit.is_tracing():
            raise InvalidInputError(f"the network takes single samples; it cannot be bounded on a batch of {batch}")
        return torch.cat([self.network(one) for one in x.split(1)])

    def extra_repr(self) -> str:
        """What the file is."""
        return f"{self.input_shape} -> {self.output_shape}, opset {self.opset}, {self.producer or 'unknown exporter'}"


def load_onnx(
    source: str | Path | bytes,
    batch_size: int | None = None,
    *,
    input: str | None = None,
    output: str | None = None,
    fixed: dict[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    logits: bool = False,
    max_bytes: int = 2**29,
    timeout: float | None = None,
) -> ImportedModel:
    """Import a network from an ONNX file, and check that it is the same.

    Args:
        source: Path of a ``.onnx`` or ``.onnx.gz`` file, or its bytes.
        batch_size: Batch size to check beside 1, default 3.
        input: The input that varies, where there are several; default the only one that `fixed` leaves.
        output: The output to import, where there are several.
        fixed: Values of the other inputs, by name, with the axes that the file gives them.
        input_shape: Shape of one sample, where the file leaves sizes beside the batch open.
        logits: Cut a Softmax or LogSoftmax at the end off: the same classes are first, and bounds are tighter.
        max_bytes: Cap on the size of the file, unpacked, default 512 MiB.
        timeout: Seconds of processor time, default 9 and a quarter more for each MiB of the network. It is looked at
            in every stage; one step of onnx or onnxruntime runs to its end.

    Returns:
        The network, in eval mode.

    Raises:
        DataError: There is no such file, or it is truncated, corrupt or too large.
        OnnxError: The network cannot be imported; says which op and node, and the way out. Or that takes
            longer than `timeout`, or has too many operations.

    Example:
        >>> from lirpa_ext import BoundedModule, load_onnx
        >>> model = load_onnx("network.onnx")  # doctest: +SKIP
        >>> BoundedModule(model, torch.zeros(1, *model.input_shape))  # doctest: +SKIP
    """
    if batch_size is not None and batch_size < 1:
        raise InvalidInputError(f"batch_size must be positive, got {batch_size}")
    if timeout is not None and not timeout > 0:
        raise InvalidInputError(f"timeout must be positive, in seconds, got {timeout}")
    load_extensions()
    import_onnx2torch()  # seconds the first time, which are not the network's
    deadline = Deadline(time.thread_time() + (timeout or math.inf), time.thread_time)
    try:
        with one_thread(), deadline:
            model = read_onnx(source, max_bytes)
            if timeout is None:
                timeout = _LEAST_SECONDS + _SECONDS_FOR_MIB * model.ByteSize() / 2**20
                deadline.end = time.thread_time() + timeout
            deadline.check()
            selected = select(model, input, output, fixed, input_shape, logits)
            return _import(*selected, batch_size, deadline)
    except OutOfTime:
        raise OnnxError(
            f"importing the network takes more than {timeout:.3g} s of processor time: give it more by timeout=, or "
            "import a smaller part of it"
        ) from None


def _import(
    original: onnx.ModelProto, selection: Selection, batch_size: int | None, deadline: Deadline
) -> ImportedModel:
    opset = opset_of(original)
    graph = Graph.of(upgrade(selection.model))
    graph.deadline = deadline
    rewrites = [f"opset {opset} -> {graph.opset}"] if graph.opset != opset else []
    graph.input_shape = selection.input_shape
    rewrites += [*selection.notes, *single_precision(graph)]
    batched = not lacks_batch_axis(graph.input_shape)
    sample_shape = tuple(size or 1 for size in graph.input_shape[batched:])
    reference = Reference(original, selection.input, selection.output, selection.fixed, sample_shape, batched)
    any_batch = True
    if batched:
        any_batch = free_batch(graph)
    else:
        add_batch_axis(graph)
        rewrites.append("batch axis added")
    rewrites += normalize(graph)
    if len(graph.shapes.get(graph.output, ())) == 1:
        rewrites.append("output of one number a sample -> (batch, 1)")
        add_output_axis(graph)
    if not graph.nodes:
        raise OnnxError("the network hands on its input or a constant: there is nothing to bound", opset=opset)
    if len(graph.nodes) > _MOST_OPERATIONS:
        raise OnnxError(
            f"the network has {len(graph.nodes)} operations, over {_MOST_OPERATIONS}: import a smaller part of it",
            opset=opset,
        )
    network = convert(graph)
    sizes = (1, batch_size or 3) if any_batch and batch_size != 1 else (1,)
    result = check(network, graph, reference, sizes, opset)
    output_shape = tuple(network(torch.zeros(1, *sample_shape)).shape[1:])
    return ImportedModel(
        network, reference, output_shape, _layout(graph), opset, _producer(original), None if any_batch else 1,
        tuple(rewrites), result,
    ).eval()  # fmt: skip


def normalize(graph: Graph) -> list[str]:
    """Bring a graph into the form that is converted; notes of what was done."""
    notes: list[str] = []
    for _ in range(_ROUNDS):
        done = fold_shapes(graph) + lower(graph)
        notes += done
        if not done:
            break
    return notes + downgrade(graph) + fuse(graph)


def _layout(graph: Graph) -> str:
    rank = len(graph.input_shape)
    if rank != 4:
        return "flat" if rank == 2 else "other"
    first = graph.users(graph.input)
    moved = [list(node.get("perm", [])) for node in first if node.op == "Transpose"]
    return "NHWC" if moved and moved == [[0, 3, 1, 2]] * len(first) else "NCHW"


def _producer(model: Any) -> str:
    return f"{model.producer_name} {model.producer_version}".strip()
