"""A small editable view of an ONNX graph, on which the rewrites work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..engine.limits import Deadline
from .reading import opset_of

OPSET = 17  # opset of the normal form, the newest that onnx2torch supports in full
IR_VERSION = 8
DOMAIN = "lirpa_ext"  # domain of operations that opset 17 lacks and that `converters` converts


@dataclass(eq=False)
class Node:
    """One operation of a graph.

    Attributes:
        op: Type of the operation, such as "Conv".
        inputs: Names of the tensors that it reads; "" for an optional input that is absent.
        outputs: Names of the tensors that it computes.
        attributes: Attributes by name, plain values and arrays.
        name: Name of the node, for messages.
        domain: Domain of the operation; "" for the standard one.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""

    @property
    def output(self) -> str:
        """Name of the first output."""
        return self.outputs[0]

    def get(self, attribute: str, default: Any = None) -> Any:
        """Value of an attribute, or `default` if the node does not have it."""
        return self.attributes.get(attribute, default)

    def __str__(self) -> str:
        return f"{self.op} node {self.name or self.output!r}"


class Graph:
    """A graph with one input and one output: nodes in topological order, and constants.

    Attributes:
        nodes: The operations.
        constants: Weights and constants by name.
        input: Name of the input.
        input_shape: Shape of the input with the batch axis; None on axis 0 if the graph takes any batch size.
        input_type: Data type of the input.
        output: Name of the output.
        opset: Version of ONNX's standard operations.
        shapes: Name -> shape of each tensor for a batch of one; set by `batching.fold_shapes`.
        shapes_of_two: Name -> shape of each tensor for a batch of two (of one, if the graph takes single samples).
        types: Name -> data type of each tensor.
        deadline: Time limit of the import, checked by `each`.
    """

    def __init__(
        self,
        nodes: list[Node],
        constants: dict[str, np.ndarray],
        input: str,
        input_shape: tuple[int | None, ...],
        input_type: np.dtype,
        output: str,
        opset: int,
    ) -> None:
        self.nodes, self.constants, self.input, self.input_shape = nodes, constants, input, input_shape
        self.input_type, self.output, self.opset = input_type, output, opset
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shapes_of_two: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype] = {}
        self.deadline = Deadline()
        self._replaced: set[Node] = set()
        self._names = {name for node in nodes for name in [*node.inputs, *node.outputs]} | set(constants)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Graph:
        """The graph of an ONNX model with one input (besides its weights) and one output."""
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        (value,) = (value for value in model.graph.input if value.name not in constants)
        nodes = []
        for proto in model.graph.node:
            attributes = {attribute.name: _value(attribute) for attribute in proto.attribute}
            if proto.op_type == "Constant":
                constants[proto.output[0]] = _constant(attributes)
            else:
                nodes.append(Node(proto.op_type, list(proto.input), list(proto.output), attributes, proto.name))
        kind = value.type.tensor_type
        return cls(
            nodes, constants, value.name, shape_of(value), helper.tensor_dtype_to_np_dtype(kind.elem_type),
            model.graph.output[0].name, opset_of(model),
        )  # fmt: skip

    def to_model(self, outputs: Iterable[str] = ()) -> onnx.ModelProto:
        """The graph as an ONNX model; `outputs` are names of tensors to add to its outputs."""
        shape = [size if size is not None else "batch" for size in self.input_shape]
        kind = helper.np_dtype_to_tensor_dtype(self.input_type)
        names: set[str] = set()
        nodes = []
        for index, node in enumerate(self.nodes):
            name = node.name if node.name and node.name not in names else f"{node.op}/{index}"
            names.add(name)
            attributes = {key: _attribute(value) for key, value in node.attributes.items()}
            nodes.append(helper.make_node(node.op, node.inputs, node.outputs, name, domain=node.domain, **attributes))
        wanted = list(dict.fromkeys([self.output, *outputs]))
        graph = helper.make_graph(
            nodes, "network", [helper.make_tensor_value_info(self.input, kind, shape)],
            [onnx.ValueInfoProto(name=name) for name in wanted],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
            value_info=[self._known(name) for node in self.nodes if node.domain for name in node.outputs],
        )  # fmt: skip
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _known(self, name: str) -> onnx.ValueInfoProto:
        """Shape and type of the output of an operation of our own domain, which onnx cannot infer."""
        one, two = self.shapes.get(name), self.shapes_of_two.get(name)
        if one is None or two is None or len(one) != len(two):
            return onnx.ValueInfoProto(name=name)
        dims = [size if size == other else None for size, other in zip(one, two, strict=True)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.types[name]), dims)

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor; None for the input and constants."""
        return next((node for node in self.nodes if name in node.outputs), None)

    def users(self, name: str) -> list[Node]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if name in node.inputs]

    def only_user(self, name: str) -> Node | None:
        """The only node that reads a tensor; None if there are several, or if the tensor is the output."""
        users = self.users(name)
        return users[0] if len(users) == 1 and name != self.output else None

    def constant(self, name: str) -> np.ndarray | None:
        """Value of a constant tensor; None for any other tensor."""
        return self.constants.get(name)

    def optional(self, node: Node, index: int) -> np.ndarray | None:
        """Value of the input of a node at an index; None if the input is absent or no constant."""
        return self.constants.get(node.inputs[index]) if index < len(node.inputs) else None

    def has(self, node: Node, index: int) -> bool:
        """Whether a node has an input at an index."""
        return index < len(node.inputs) and node.inputs[index] != ""

    def fresh(self, stem: str) -> str:
        """A name that is not in use, and that begins with `stem`."""
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, value: Any, stem: str, dtype: Any = None) -> str:
        """Add a constant, and return its name, which begins with `stem`."""
        name = self.fresh(stem)
        self.constants[name] = np.asarray(value, dtype)
        return name

    def replace(self, node: Node, nodes: list[Node]) -> None:
        """Replace a node by others, which must compute its outputs."""
        place = self.nodes.index(node)
        self.nodes[place : place + 1] = nodes
        if node not in nodes:
            self._replaced.add(node)

    def each(self) -> Iterator[Node]:
        """Iterate over the present nodes; a node that is replaced before its turn is skipped.

        Raises:
            OutOfTime: The deadline has passed.
        """
        for node in list(self.nodes):
            self.deadline.check()
            if node not in self._replaced:
                yield node

    def redirect(self, old: str, new: str) -> None:
        """Let every node that reads the tensor `old` read `new`; the output is redirected likewise."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        if self.output == old:
            self.output = new

    def prune(self) -> None:
        """Remove nodes and constants on which the output does not depend."""
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Declared shape of a tensor; None for sizes that the file leaves open."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _attribute(value: Any) -> Any:
    return numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value


def _constant(attributes: dict[str, Any]) -> np.ndarray:
    name, value = next(iter(attributes.items()))
    return np.asarray(value, {"value_float": np.float32, "value_floats": np.float32}.get(name))
