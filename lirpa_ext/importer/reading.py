"""Safe reading of untrusted ONNX files: the model is parsed, limited in size, inlined, sorted, and complete."""

from __future__ import annotations

import gzip
import heapq
import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import external_data_helper, inliner, numpy_helper

from ..errors import DataError, OnnxError

OLDEST_OPSET = 7
MOST_NODES = 2000  # after inlining; the largest of 170 networks from the literature has 1,500
_LONGEST = 4096  # characters of a name
_STANDARD = ("", "ai.onnx")
_FREE, _RATIO = 2**27, 32  # a gzip file may unpack to so many bytes, or to this multiple of its size if that is more
_MOST_VALUES = 5 * MOST_NODES
_Call = tuple[str, str, str]  # domain, name and overload of an operation or a function


def read_onnx(source: str | Path | bytes, max_bytes: int) -> onnx.ModelProto:
    """Read and check an ONNX file.

    Args:
        source: Path of a ``.onnx`` or ``.onnx.gz`` file, or its bytes.
        max_bytes: Largest allowed size of the file, unpacked, and of its external data.

    Returns:
        The model, which contains its weights, with local functions inlined and nodes in topological order.

    Raises:
        DataError: The file is missing, truncated, not ONNX or too large, or its external data are missing.
        OnnxError: The model has an opset, a domain, an operation or weights that are not supported, or too many nodes.
    """
    folder = None
    if not isinstance(source, bytes):
        path = Path(source)
        if not os.path.isfile(path):
            raise DataError(f"there is no file {str(path)[:200]}")
        if path.stat().st_size > max_bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, over max_bytes={max_bytes}")
        source, folder, where = path.read_bytes(), path.parent, str(path)
    else:
        where = "the model"
    model = _parse(unpack(source, max_bytes, where), where)
    _load_external(model, folder, max_bytes, where)
    _check_opset(model, where)
    model = _inline(model, where)
    _sort(model.graph, where)
    _name_splits(model.graph)
    for node in model.graph.node:
        _check_node(node, opset_of(model))
    _check_tensors(model.graph, where)
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's standard operations that a model uses; 0 if it has none."""
    return next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0)


def unpack(data: bytes, max_bytes: int, where: str) -> bytes:
    """Unzip bytes if they are gzip; other bytes are returned as they are.

    Args:
        data: Content of a file.
        max_bytes: Largest allowed number of bytes, unpacked.
        where: Name of the file, for messages.

    Raises:
        DataError: The gzip data are corrupt, the result has more than `max_bytes`, or gzip data unpack to more than
            128 MiB and more than 32 times their size.
    """
    if data[:2] == b"\x1f\x8b":
        most = min(max_bytes, max(_FREE, _RATIO * len(data)))
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
        except EOFError as error:
            raise DataError(f"{where} is a truncated gzip file") from error
        except (OSError, zlib.error, MemoryError) as error:
            raise DataError(f"{where} is no valid gzip file: {error}") from error
        if len(data) > most:
            raise DataError(
                f"{where} expands to more than max_bytes={max_bytes} bytes, or to far more than it has: unzip it first"
            )
    if len(data) > max_bytes:
        raise DataError(f"{where} has {len(data)} bytes, over max_bytes={max_bytes}")
    return data


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise DataError(f"{where} is truncated, or no ONNX file: {error}") from error
    if not (model.graph.node and model.graph.output and model.opset_import):
        raise DataError(f"{where} is truncated, or no ONNX file: it has no graph, no output or no opset")
    try:
        if not all(isinstance(name, str) and len(name) < _LONGEST for name in _names(model.graph)):
            raise DataError(f"{where} is corrupt: a name in it is no text, or of {_LONGEST} characters and more")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is corrupt: a name in it is no text") from error
    return model


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """All names in a graph; protobuf does not check that they are valid text."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in graph.initializer:
        yield tensor.name
    for value in (*graph.input, *graph.output):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _load_external(model: onnx.ModelProto, folder: Path | None, max_bytes: int, where: str) -> None:
    external = [t for t in _all_tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        return
    if folder is None:
        raise DataError(f"{where} keeps weights in other files, which bytes cannot name: pass the path of the file")
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    if any("\0" in name for name in names):
        raise DataError(f"{where} is corrupt: the name of a file with its weights is none")
    outside = sorted(name for name in names if not (folder / name).resolve().is_relative_to(folder.resolve()))
    if outside:
        raise DataError(f"{where} names {', '.join(outside)} for its weights, which do not lie beside it")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise DataError(f"{where} keeps weights in {', '.join(missing)}, which must lie beside it")
    try:
        if sum(_bytes_of_external(tensor, folder) for tensor in external) > max_bytes:
            raise DataError(f"the weights beside {where} have more than max_bytes={max_bytes} bytes")
        for tensor in external:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except DataError:
        raise
    except Exception as error:  # onnx raises whatever comes
        raise DataError(f"the external data of {where} cannot be read: {error}") from error


def _bytes_of_external(tensor: onnx.TensorProto, folder: Path) -> int:
    info = external_data_helper.ExternalDataInfo(tensor)
    return info.length or (folder / info.location).stat().st_size


def _check_opset(model: onnx.ModelProto, where: str) -> None:
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if len({entry.version for entry in model.opset_import if entry.domain in _STANDARD}) > 1:
        raise DataError(f"{where} is corrupt: it is of two opsets")
    if opset < OLDEST_OPSET:
        raise OnnxError(
            f"{where} is of opset {opset}; the oldest that can be read is {OLDEST_OPSET}: export it again", opset=opset
        )
    if opset > newest:
        raise OnnxError(f"{where} is of opset {opset}, the installed onnx knows {newest}: update onnx", opset=opset)


def _inline(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Inline the local functions of a model. Nodes are counted before, since inlining can grow exponentially."""
    bodies = {_called(function, function.name): _calls(function.node) for function in model.functions}
    if len(bodies) < len(model.functions):
        raise DataError(f"{where} is corrupt: it has two functions of one name")
    sizes: dict[_Call, int] = {}
    waiting = list(bodies)
    open_: set[_Call] = set()
    while waiting:
        name = waiting[-1]
        calls = bodies[name]
        unknown = {call for call in calls if call in bodies and call not in sizes}
        if name in sizes or not unknown:
            sizes[name] = sum(sizes.get(call, 1) for call in calls)
            waiting.pop()
        elif name in open_ or unknown & open_:
            raise DataError(f"{where} is corrupt: its function {name[1]!r} calls itself")
        else:
            open_.add(name)
            waiting += unknown
    total = sum(sizes.get(call, 1) for call in _calls(model.graph.node))
    if total > MOST_NODES:
        inlined = " once its functions are inlined" if bodies else ""
        raise OnnxError(f"{where} has more than {MOST_NODES} nodes{inlined}: import a smaller part of it")
    values = sum(len(node.input) + len(node.output) for node in model.graph.node)
    if values > _MOST_VALUES:
        raise OnnxError(f"the nodes of {where} have {values} inputs and outputs, over {_MOST_VALUES}")
    if not bodies:
        return model
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # onnx raises whatever comes
        raise DataError(f"{where} is corrupt: its functions cannot be inlined: {error}") from error


def _called(node: onnx.NodeProto | onnx.FunctionProto, name: str) -> _Call:
    return node.domain, name, getattr(node, "overload", "")  # overload is new in onnx 1.16


def _calls(nodes: Iterable[onnx.NodeProto]) -> list[_Call]:
    """Operations and functions that nodes call, including nodes inside of branches and loops."""
    return [_called(node, node.op_type) for node in _all_nodes(nodes)]


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _sort(graph: onnx.GraphProto, where: str) -> None:
    """Put the nodes of a graph in topological order; DataError if a tensor is missing or there is a cycle."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    if len({tensor.name for tensor in graph.initializer}) < len(graph.initializer):
        raise DataError(f"{where} is corrupt: it has two weights of one name")
    made: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in known:
                raise DataError(f"{where} is corrupt: {name!r} is computed twice")
            made[name] = node
    lacks = {index: {name for name in node.input if name not in known} for index, node in enumerate(graph.node)}
    readers: dict[str, list[int]] = {}
    for index, names in lacks.items():
        for name in names:
            readers.setdefault(name, []).append(index)
    ready, ordered = [index for index, names in lacks.items() if not names], []
    while ready:
        node = graph.node[heapq.heappop(ready)]  # the heap keeps the order of the file where it is topological
        ordered.append(node)
        for name in filter(None, node.output):
            known.add(name)
            for reader in readers.get(name, []):
                lacks[reader].discard(name)
                if not lacks[reader]:
                    heapq.heappush(ready, reader)
    if len(ordered) < len(graph.node):
        index, names = next((index, names) for index, names in lacks.items() if names)
        unknown = sorted(name for names in lacks.values() for name in names if name not in made)
        cause = f"nothing computes {unknown[0]!r}" if unknown else f"a cycle through {describe(graph.node[index])}"
        raise DataError(f"{where} is corrupt: {cause}")
    unknown = [value.name for value in graph.output if value.name not in known]
    if unknown:
        raise DataError(f"{where} is corrupt: nothing computes its output {unknown[0]!r}")
    if [id(node) for node in ordered] != [id(node) for node in graph.node]:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(copies)


def _name_splits(graph: onnx.GraphProto) -> None:
    """Name the unused outputs of Split nodes, because onnxruntime crashes on a Split with an absent output."""
    for index, node in enumerate(graph.node):
        if node.op_type == "Split":
            node.output[:] = [name or f"split/{index}/{part}" for part, name in enumerate(node.output)]


def describe(node: onnx.NodeProto) -> str:
    """Operation and name of a node, for error messages."""
    return f"{node.op_type} node {node.name or (node.output[0] if node.output else '')!r}"


def _check_node(node: onnx.NodeProto, opset: int) -> None:
    if node.domain not in _STANDARD:
        raise OnnxError(
            f"{describe(node)} is of the custom domain {node.domain!r}, whose meaning the file does not tell: "
            "export the model with standard ops",
            node.op_type, node.name, opset,
        )  # fmt: skip
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise OnnxError(
                f"{describe(node)} branches or loops (opset {opset}), which has no bounds: export a model without "
                "control flow",
                node.op_type, node.name, opset,
            )  # fmt: skip
    try:
        onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    except onnx.defs.SchemaError as error:
        raise OnnxError(
            f"opset {opset} has no op {node.op_type} ({describe(node)}): the file is corrupt, or of another opset "
            "than it says",
            node.op_type, node.name, opset,
        ) from error  # fmt: skip


def _all_tensors(part: Message) -> Iterator[onnx.TensorProto]:
    """All tensors in a part of a model, including those of attributes, functions, branches and sparse tensors."""
    for field, value in part.ListFields():
        if field.message_type is None:
            continue
        for inner in value if isinstance(value, Sequence) else [value]:
            if isinstance(inner, onnx.TensorProto):
                yield inner
            else:
                yield from _all_tensors(inner)


def _check_tensors(graph: onnx.GraphProto, where: str) -> None:
    if graph.sparse_initializer:
        raise OnnxError(f"{where} has sparse weights: export it with dense ones")
    for tensor in _all_tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise DataError(f"{where} keeps weight {tensor.name!r} where it cannot be found")
        name = tensor.name or "a constant"
        try:
            if min(tensor.dims, default=1) < 0 or math.prod(tensor.dims) > 2**31:
                raise ValueError(f"its shape is {list(tensor.dims)}")
            value = numpy_helper.to_array(tensor)
        except Exception as error:  # numpy and onnx raise whatever comes on truncated data
            raise DataError(f"{where} is corrupt: weight {name!r} cannot be read: {error}") from error
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise DataError(f"{where} has NaN entries in weight {name!r}: nothing can be said of such a network")
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise OnnxError(f"input {value.name!r} of {where} is no tensor")
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        if min(sizes, default=1) < 1:
            raise DataError(f"input {value.name!r} of {where} has an axis of size {min(sizes)}")
