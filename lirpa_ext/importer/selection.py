"""Reduction of a model to one input and one output: other inputs get fixed values, other outputs are dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import InvalidInputError, OnnxError
from .graph import Graph, shape_of
from .reading import opset_of

_FLOAT = onnx.TensorProto.FLOAT


@dataclass
class Selection:
    """A model with one input and one output, and how it was made from the file.

    Attributes:
        model: The reduced model.
        input: Name of the input.
        output: Name of the output.
        fixed: Values of the other inputs by name.
        input_shape: Shape of the input, with a batch axis if it has one; None for an open batch size.
        notes: Notes of the changes.
    """

    model: onnx.ModelProto
    input: str
    output: str
    fixed: dict[str, np.ndarray]
    input_shape: tuple[int | None, ...]
    notes: list[str]


def select(
    model: onnx.ModelProto,
    input: str | None,
    output: str | None,
    fixed: dict[str, Any] | None,
    input_shape: tuple[int, ...] | None,
    logits: bool,
) -> tuple[onnx.ModelProto, Selection]:
    """Reduce a model to one input and one output. The arguments are those of `lirpa_ext.load_onnx`.

    Args:
        model: The model of the file; with `logits`, the input of the last softmax is added to its outputs.
        input: Name of the input that varies; None for the only one that is not fixed.
        output: Name of the output; None for the only one.
        fixed: Values of the other inputs by name.
        input_shape: Shape of one sample, if the file leaves sizes open.
        logits: Whether to cut off a Softmax or LogSoftmax at the end.

    Returns:
        The original model, for `Reference`, and the reduced one.

    Raises:
        OnnxError: The input or the output is ambiguous, sizes are open, a data type is not supported, or the output
            does not depend on the input.
        InvalidInputError: The file does not have a name or a shape that is given.
    """
    graph, opset, notes = model.graph, opset_of(model), []
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in weights}
    constants = _fixed(inputs, fixed or {})
    free = [name for name in inputs if name not in constants]
    chosen = _choose("input", input, free, opset, "fix the others by fixed={name: array}")
    result = _choose("output", output, [value.name for value in graph.output], opset, "the others are dropped")
    others = [name for name in free if name != chosen]
    if others:
        raise OnnxError(f"inputs {', '.join(others)} vary too: give their values by fixed=", opset=opset)
    if logits:
        last = next((node for node in graph.node if result in node.output), None)
        if last is not None and last.op_type in ("Softmax", "LogSoftmax"):
            notes.append(f"last {last.op_type} cut off")
            result = last.input[0]
            if all(value.name != result for value in graph.output):
                graph.output.append(onnx.ValueInfoProto(name=result))
    shape = _input_shape(inputs[chosen], input_shape, opset)
    reduced = onnx.ModelProto.FromString(model.SerializeToString())
    _fix_inputs(reduced.graph, chosen, constants, shape)
    del reduced.graph.output[:]
    reduced.graph.output.append(next(value for value in graph.output if value.name == result))
    if not _prune(reduced.graph, chosen, result):
        raise OnnxError(f"output {result!r} does not depend on input {chosen!r}", opset=opset)
    del reduced.graph.value_info[:]
    return model, Selection(reduced, chosen, result, constants, shape, notes)


def _choose(what: str, name: str | None, known: list[str], opset: int, hint: str) -> str:
    if name is None and len(known) == 1:
        return known[0]
    if name is None:
        raise OnnxError(f"the network has {len(known)} {what}s ({', '.join(known)}): choose one by {what}=; {hint}")
    if name not in known:
        raise InvalidInputError(f"the network has no {what} {name!r}; it has {', '.join(known)}")
    return name


def _fixed(inputs: dict[str, onnx.ValueInfoProto], values: dict[str, Any]) -> dict[str, np.ndarray]:
    unknown = [name for name in values if name not in inputs]
    if unknown:
        raise InvalidInputError(f"the network has no input {unknown[0]!r}; it has {', '.join(inputs)}")
    fixed = {}
    for name, value in values.items():
        dtype = helper.tensor_dtype_to_np_dtype(inputs[name].type.tensor_type.elem_type)
        fixed[name] = np.asarray(value).astype(dtype)
        declared = shape_of(inputs[name])
        if len(declared) != fixed[name].ndim or any(
            size not in (None, given) for size, given in zip(declared, fixed[name].shape, strict=True)
        ):
            raise InvalidInputError(f"input {name!r} has shape {declared}, got {fixed[name].shape}")
    return fixed


def _input_shape(value: onnx.ValueInfoProto, given: tuple[int, ...] | None, opset: int) -> tuple[int | None, ...]:
    kind, declared = value.type.tensor_type.elem_type, shape_of(value)
    if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        raise OnnxError(f"input {value.name!r} is of half precision: export the model in float32", opset=opset)
    if kind in (onnx.TensorProto.STRING, onnx.TensorProto.BOOL):
        raise OnnxError(f"input {value.name!r} holds no numbers, so there is no ball around it", opset=opset)
    if given is not None:
        open_shape = declared or (None, *given)
        if len(open_shape) not in (len(given), len(given) + 1) or any(
            size not in (None, own) for size, own in zip(open_shape[::-1], given[::-1], strict=False)
        ):
            raise InvalidInputError(f"input {value.name!r} has shape {declared}, which {given} does not fit")
        return (*open_shape[: len(open_shape) - len(given)], *given)
    if not declared or None in declared[len(declared) > 1 :]:
        raise OnnxError(
            f"input {value.name!r} leaves sizes open, {declared}: give the shape of one sample by input_shape=",
            opset=opset,
        )
    if math.prod(size or 1 for size in declared) > 2**28:
        raise OnnxError(f"input {value.name!r} is enormous: {declared}", opset=opset)
    return declared


def _fix_inputs(
    graph: onnx.GraphProto, chosen: str, constants: dict[str, np.ndarray], shape: tuple[int | None, ...]
) -> None:
    value = next(value for value in graph.input if value.name == chosen)
    typed = helper.make_tensor_value_info(
        chosen, value.type.tensor_type.elem_type, [size if size is not None else "batch" for size in shape]
    )
    del graph.input[:]
    graph.input.append(typed)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())


def _prune(graph: onnx.GraphProto, chosen: str, output: str) -> bool:
    """Remove nodes and weights that the output does not need; whether it depends on the input."""
    needed, kept = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            needed.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept[::-1])
    graph.initializer.extend(copies)
    return chosen in needed


def single_precision(graph: Graph) -> list[str]:
    """Convert weights, input and casts of float64, and an integer input that is cast, to float32, in place.

    Returns:
        Notes of the changes.

    Raises:
        OnnxError: A node takes the integers of the input without a cast.
    """
    notes = []
    if graph.input_type != np.float32:
        whole = graph.input_type.kind in "ui"
        user = next((node for node in graph.users(graph.input) if node.op != "Cast"), None) if whole else None
        if user is not None:
            raise OnnxError(
                f"input {graph.input!r} holds whole numbers ({graph.input_type}), which {user} takes as such, so there "
                "is no ball around it: export the model with an input of float32",
                user.op, user.name, graph.opset,
            )  # fmt: skip
        notes.append(f"input of {graph.input_type} -> float32")
        graph.input_type = np.dtype(np.float32)
    wide = [name for name, value in graph.constants.items() if value.dtype == np.float64]
    for name in wide:
        graph.constants[name] = graph.constants[name].astype(np.float32)
    for node in graph.nodes:
        if node.op == "Cast" and node.get("to") == onnx.TensorProto.DOUBLE:
            node.attributes["to"] = _FLOAT
        value = node.get("value")
        if isinstance(value, np.ndarray) and value.dtype == np.float64:
            node.attributes["value"] = value.astype(np.float32)
    return notes + ([f"{len(wide)} weights of float64 -> float32"] if wide else [])
