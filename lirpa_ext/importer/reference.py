"""The original network in onnxruntime, and the values and shapes of all tensors of a graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from ..engine.limits import memory_limit
from ..errors import OnnxError
from .graph import Graph, shape_of

# Limits on one run; a corrupt pad or kernel size could ask for more than a machine has.
_MOST_ELEMENTS = 2**27  # elements of all tensors
_MOST_PRODUCTS = 2**36  # multiplications; VGG-16 on a batch of three takes 2**35.4
_MOST_BYTES = 2**30  # bytes of memory, if onnx cannot infer the size of every tensor


def session(model: onnx.ModelProto | bytes, optimize: bool = True) -> Any:
    """Make an onnxruntime session on one CPU thread, without logging.

    Args:
        model: The model, or its bytes.
        optimize: Whether onnxruntime optimizes the graph, default True; without it every tensor can be an output.

    Raises:
        OnnxError: onnxruntime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise OnnxError(f"onnxruntime refuses the network: {_first_line(error)}") from error


class Reference:
    """The original network in onnxruntime, run sample by sample, for any batch size of the file.

    Args:
        model: The model.
        input: Name of the input that varies.
        output: Name of the output.
        fixed: Values of the other inputs by name.
        sample_shape: Shape of one sample, without the batch axis.
        batched: Whether the input in the file has a batch axis.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        input: str,
        output: str,
        fixed: dict[str, np.ndarray],
        sample_shape: tuple[int, ...],
        batched: bool,
    ) -> None:
        value = next(value for value in model.graph.input if value.name == input)
        self.input, self.output, self.fixed = input, output, fixed
        self.sample_shape, self.batched = sample_shape, batched
        self.dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        self.copies = shape_of(value)[0] or 1 if batched else 1
        self.model = model.SerializeToString()
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None}  # sessions can be neither copied nor pickled

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Outputs of a batch, ``(B, *sample_shape)`` -> (B, ...), with at least two axes.

        Raises:
            OnnxError: onnxruntime fails.
        """
        self._session = self._session or session(self.model)
        outputs = [run(self._session, [self.output], self._feed(sample))[0] for sample in x]
        stacked = np.stack([self._of_sample(output) for output in outputs])
        return stacked if stacked.ndim > 1 else stacked[:, None]

    def values(self, sample: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> value of every tensor of the file for one sample of `sample_shape`, with the file's batch axis."""
        model = onnx.ModelProto.FromString(self.model)
        names = [name for node in model.graph.node for name in node.output if name]
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        return dict(zip(names, run(session(model, optimize=False), names, self._feed(sample)), strict=True))

    def _feed(self, sample: np.ndarray) -> dict[str, np.ndarray]:
        value = np.asarray(sample).reshape(self.sample_shape).astype(self.dtype)
        if self.batched:
            value = np.repeat(value[None], self.copies, 0)
        return {self.input: value, **self.fixed}

    def _of_sample(self, output: np.ndarray) -> np.ndarray:
        return output[0] if self.batched and output.ndim and len(output) == self.copies else output


def run(session: Any, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a session.

    Args:
        session: Session of onnxruntime.
        outputs: Names of the outputs to compute.
        feed: Name -> value of each input.

    Returns:
        Value of each output.

    Raises:
        OnnxError: onnxruntime fails.
    """
    try:
        return session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise OnnxError(f"onnxruntime cannot run the network: {_first_line(error)}") from error


def probe(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    """Compute every tensor of a graph for a batch of random samples.

    Args:
        graph: The graph.
        batch: Number of samples.

    Returns:
        Name -> value of each tensor, the input included.

    Raises:
        OnnxError: The graph does not run, a value is no tensor, or a tensor would be enormous.
    """
    graph.deadline.check()
    names = [name for node in graph.nodes for name in node.outputs if name]
    model = graph.to_model(names)
    shape = [batch if size is None else size for size in graph.input_shape]
    known = _check_size(model, batch)
    x = np.random.default_rng(0).uniform(0, 1, shape).astype(graph.input_type)
    with memory_limit(None if known else _MOST_BYTES):
        values = run(session(model, optimize=False), names, {graph.input: x}) if names else []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray):
            maker = next(node for node in graph.nodes if name in node.outputs)
            raise OnnxError(f"{maker} gives a {type(value).__name__}, no tensor", maker.op, maker.name)
    return {graph.input: x, **dict(zip(names, values, strict=True))}


def _check_size(model: onnx.ModelProto, batch: int) -> bool:
    """Whether onnx infers the size of every tensor; OnnxError for enormous tensors or too many multiplications."""
    try:
        inferred = shape_inference.infer_shapes(model)
    except Exception as error:  # onnx has several
        raise OnnxError(f"its shapes do not fit together: {_first_line(error)}") from error
    total, known = 0, set()
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shape = shape_of(value)
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value or dim.dim_param == "batch" for dim in dims):
            known.add(value.name)
        shapes[value.name] = tuple(batch if size is None else size for size in shape)
        elements = math.prod(shapes[value.name])
        total += max(elements, 0)
        if not 0 <= elements <= _MOST_ELEMENTS:
            raise OnnxError(f"tensor {value.name!r} would have {elements} elements, over {_MOST_ELEMENTS}")
        if elements == 0:
            raise OnnxError(f"tensor {value.name!r} has an axis of size 0: {shape}")
    products = sum(_products(node, shapes) for node in model.graph.node)
    if total > _MOST_ELEMENTS or products > _MOST_PRODUCTS:
        raise OnnxError(
            f"the network is enormous: {total:.4g} elements of tensors, {products:.4g} products, where at most "
            f"{_MOST_ELEMENTS} and {_MOST_PRODUCTS} can be checked"
        )
    return all(name in known for node in model.graph.node for name in node.output if name)


def _products(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of multiplications of a convolution, matrix product or pool; of any other node, its output's elements."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in ("kernel_shape", "transA")}
    first, second = ([shapes.get(name, ()) for name in node.input] + [(), ()])[:2]
    elements = math.prod(shapes.get(node.output[0], ()))
    if node.op_type in ("Conv", "ConvTranspose"):
        return (elements if node.op_type == "Conv" else math.prod(first)) * math.prod(second[1:])
    if node.op_type in ("MatMul", "Gemm") and first:
        return elements * first[0 if attributes.get("transA") else -1]
    return elements * math.prod(attributes.get("kernel_shape", ()))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
