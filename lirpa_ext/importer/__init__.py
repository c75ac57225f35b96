"""Import of ONNX networks as torch modules: read, brought into normal form, converted, compared with onnxruntime."""

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

_ROUNDS = 8  # rounds of rewriting; each needs the shapes of the tensors that the previous one made
_MOST_OPERATIONS = 1000  # operations in normal form; the engine takes at least 4 ms to build each, twice
_LEAST_SECONDS, _SECONDS_FOR_MIB = 9.0, 0.25


class ImportedModel(nn.Module):
    """A network from an ONNX file, in float32 and eval mode: batches of `input_shape` to batches of `output_shape`.

    `load_onnx` makes it.

    Attributes:
        network: The torch module.
        input_name: Name of the input in the file.
        output_name: Name of the output in the file.
        input_shape: Shape of one sample.
        output_shape: Shape of the output for one sample.
        layout: Position of the channels of an image: "NCHW" or "NHWC"; "flat" for vectors, "other" for other ranks.
        opset: Version of ONNX's standard operations in the file.
        producer: Name and version of the exporter, as stated in the file.
        batch_size: 1 if the network takes single samples only; None if it takes any batch size.
        rewrites: Notes of the rewrites.
        check: How closely onnxruntime, torch and the engine agree.
        reference: The original network in onnxruntime, a function of numpy arrays, (B, ...) -> (B, ...).
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
        """Outputs of a batch, (B, ...) -> (B, ...); samples are computed one by one if `batch_size` is 1.

        Raises:
            InvalidInputError: The shape of a sample is not `input_shape`, or a network of single samples is traced with
                a larger batch.
        """
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
        """Shapes, opset and exporter, for the printed model."""
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
    """Import a network from an ONNX file, and check that it computes the same function as the file in onnxruntime.

    Args:
        source: Path of a ``.onnx`` or ``.onnx.gz`` file, or its bytes.
        batch_size: Batch size to check besides 1, default 3.
        input: Name of the input that varies, if there are several; default the only one that is not in `fixed`.
        output: Name of the output to import, if there are several.
        fixed: Values of the other inputs, by name, in the shapes of the file.
        input_shape: Shape of one sample, if the file leaves sizes other than the batch size open.
        logits: Whether to cut off a Softmax or LogSoftmax at the end, default False. The predicted classes stay the
            same, and bounds become tighter.
        max_bytes: Largest allowed size of the file, unpacked, default 512 MiB.
        timeout: Seconds of processor time, default 9 plus a quarter for each MiB of the network. The time is checked in
            every stage, but not within a call of onnx or onnxruntime.

    Returns:
        The network, in eval mode.

    Raises:
        DataError: The file is missing, truncated, corrupt or too large.
        OnnxError: The network cannot be imported; the message names the operation, the node and a way out. Or the
            import takes longer than `timeout`, or the network has too many operations.
        InvalidInputError: An argument is out of range, or names something that the file does not have.

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
    import_onnx2torch()  # the first import takes seconds, which should not count
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
    """Bring a graph into the normal form that `convert` takes, and return notes of the rewrites."""
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
