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

OPSET = 17  # of the normal form, the newest that onnx2torch knows in full
IR_VERSION = 8
DOMAIN = "lirpa_ext"  # of ops that opset 17 does not have, and `converters` does


@dataclass(eq=False)
class Node:
    """One operation.

    Attributes:
        op: Its type.
        inputs: Names of what it reads; "" for an optional input that is absent.
        outputs: Names of what it computes.
        attributes: Plain values and arrays.
        name: Its name, for messages.
        domain: "" for the standard one.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""

    @property
    def output(self) -> str:
        """Name of its first output."""
        return self.outputs[0]

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(attribute, default)

    def __str__(self) -> str:
        return f"{self.op} node {self.name or self.output!r}"


class Graph:
    """Nodes in topological order, constants, one input, one output.

    Attributes:
        nodes: The operations.
        constants: Weights and constants by name.
        input: Name of the input.
        input_shape: Its shape with the batch axis; None on axis 0 where any batch will do.
        output: Name of the output.
        shapes: Shape of every tensor for one sample, as far as it has been run (`reference.probe`).
        shapes_of_two: Likewise for a batch of two, where the graph takes one.
        types: Data types likewise.
        deadline: Of the import; whatever works through the nodes looks at it.
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
        """View of a model with one input (beside its weights) and one output."""
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
        """The model again, with further outputs if asked for."""
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
        """Shape and type of a tensor behind an op of our own, past which onnx cannot infer."""
        one, two = self.shapes.get(name), self.shapes_of_two.get(name)
        if one is None or two is None or len(one) != len(two):
            return onnx.ValueInfoProto(name=name)
        dims = [size if size == other else None for size, other in zip(one, two, strict=True)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.types[name]), dims)

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor, None for input and constants."""
        return next((node for node in self.nodes if name in node.outputs), None)

    def users(self, name: str) -> list[Node]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if name in node.inputs]

    def only_user(self, name: str) -> Node | None:
        """The node that reads a tensor, if nothing else does."""
        users = self.users(name)
        return users[0] if len(users) == 1 and name != self.output else None

    def constant(self, name: str) -> np.ndarray | None:
        """Value of a constant, None for anything else."""
        return self.constants.get(name)

    def optional(self, node: Node, index: int) -> np.ndarray | None:
        """Value of a constant input, None where it is absent or no constant."""
        return self.constants.get(node.inputs[index]) if index < len(node.inputs) else None

    def has(self, node: Node, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(node.inputs) and node.inputs[index] != ""

    def fresh(self, stem: str) -> str:
        """A name that is not in use."""
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, value: Any, stem: str, dtype: Any = None) -> str:
        """Keep a constant; its name."""
        name = self.fresh(stem)
        self.constants[name] = np.asarray(value, dtype)
        return name

    def replace(self, node: Node, nodes: list[Node]) -> None:
        """Put nodes in the place of one."""
        place = self.nodes.index(node)
        self.nodes[place : place + 1] = nodes
        if node not in nodes:
            self._replaced.add(node)

    def each(self) -> Iterator[Node]:
        """The nodes as they are now, without those that are replaced before their turn.

        Raises:
            OutOfTime: The deadline has passed.
        """
        for node in list(self.nodes):
            self.deadline.check()
            if node not in self._replaced:
                yield node

    def redirect(self, old: str, new: str) -> None:
        """Let whatever reads one tensor read another."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        if self.output == old:
            self.output = new

    def prune(self) -> None:
        """Drop what the output does not depend on."""
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Declared shape, None for sizes that are left open."""
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
