"""Comparison of an imported network with the original file in onnxruntime, on a few inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LirpaExtError, OnnxError
from ..module.bounded_module import BoundedModule
from .graph import Graph
from .reference import Reference

if TYPE_CHECKING:
    from torch.fx import GraphModule

TOLERANCE = 1e-4
SAMPLES = 5


@dataclass(frozen=True)
class Check:
    """How closely torch and the engine agree with onnxruntime on an imported network.

    Attributes:
        inputs: Number of inputs that were compared at each batch size.
        batch_sizes: The batch sizes.
        torch_error: Largest difference of the torch module from onnxruntime, relative to the largest output.
        engine_error: Largest difference of the `BoundedModule` from onnxruntime, relative to the largest output.
    """

    inputs: int
    batch_sizes: tuple[int, ...]
    torch_error: float
    engine_error: float


def check(network: GraphModule, graph: Graph, reference: Reference, batch_sizes: tuple[int, ...], opset: int) -> Check:
    """Compare a torch module and its `BoundedModule` with onnxruntime, in shape and value.

    Args:
        network: The torch module.
        graph: The graph from which it was made.
        reference: The original network in onnxruntime.
        batch_sizes: Batch sizes to compare.
        opset: Opset of the file, for messages.

    Raises:
        OnnxError: They differ by more than 1e-4 of the largest output (the message names the first node), the outputs
            are not finite, or the engine cannot trace the network.
    """
    torch_error = engine_error = 0.0
    for batch in batch_sizes:
        bounded: BoundedModule | None = None
        for x in _inputs((batch, *reference.sample_shape), reference.dtype):
            expected = torch.from_numpy(reference(x.numpy()))
            if not torch.isfinite(expected).all():
                continue
            actual = _forward(network, x, graph, reference, opset)
            error = _difference(actual, expected)
            if not error <= TOLERANCE:
                where = _first_difference(network, graph, reference, x)
                raise OnnxError(
                    f"the torch module differs from onnxruntime, {_say(actual, expected, error)}{where}. This is a "
                    "defect of the conversion: export the model again, with another opset or exporter",
                    opset=opset,
                )
            torch_error = max(torch_error, error)
            bounded = bounded or _bounded(network, x, graph, opset)
            traced = bounded(x)
            error = _difference(traced, expected)
            if not error <= TOLERANCE:
                raise OnnxError(
                    f"the engine's graph differs from onnxruntime, {_say(traced, expected, error)}: it has an op "
                    f"that the engine computes wrongly, one of {', '.join(sorted({n.op for n in graph.nodes}))}",
                    opset=opset,
                )
            engine_error = max(engine_error, error)
        if bounded is None:
            raise OnnxError("the network's output is NaN or infinite on every input that was tried", opset=opset)
    return Check(SAMPLES, batch_sizes, torch_error, engine_error)


def _inputs(shape: tuple[int, ...], dtype: np.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    unit, normal = (torch.rand(shape, generator=generator) for _ in range(2)), torch.randn(shape, generator=generator)
    first, second = unit
    if dtype.kind in "ui":  # integers, such as the bytes of images
        largest = min(255, int(np.iinfo(dtype).max))
        return [(largest * torch.rand(shape, generator=generator)).round() for _ in range(SAMPLES)]
    return [first, second, 2 * first - 1, normal, torch.zeros(shape) + 0.5 * second.mean()]


def _forward(network: nn.Module, x: Tensor, graph: Graph, reference: Reference, opset: int) -> Tensor:
    try:
        with torch.no_grad():
            output = network(x)
        if not isinstance(output, Tensor):
            raise TypeError("its last node has several outputs")
        return output
    except Exception as error:  # whatever torch raises
        where = _first_difference(network, graph, reference, x[:1])
        raise OnnxError(
            f"the torch module fails on a batch of {len(x)}: {str(error)[:200]}{where}. Export the model again, with "
            "another opset or exporter",
            opset=opset,
        ) from error


def _bounded(network: nn.Module, x: Tensor, graph: Graph, opset: int) -> BoundedModule:
    try:
        return BoundedModule(network, x)
    except LirpaExtError as error:
        node = next((node for node in graph.nodes if f"::{node.op}" in str(error)), None)
        raise OnnxError(
            f"{node or 'the network'} (opset {opset}) cannot be bounded: {error}",
            node.op if node else "", node.name if node else "", opset,
        ) from error  # fmt: skip


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=1e-6)
    return float((actual - expected).abs().max() / scale)


def _say(actual: Tensor, expected: Tensor, error: float) -> str:
    if actual.shape != expected.shape:
        return f"in shape ({tuple(actual.shape)}, not {tuple(expected.shape)})"
    return f"by {error:.2g} of the largest output"


def _first_difference(network: nn.Module, graph: Graph, reference: Reference, x: Tensor) -> str:
    """The first node whose output differs from onnxruntime's, as text for messages; "" if none does."""
    expected = reference.values(x[0].numpy())
    names = iter(graph.nodes)
    seen: dict[torch.fx.Node, object] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            seen[n] = super().run_node(n)
            return seen[n]

    try:
        with torch.no_grad():
            Recorder(network).run(x[:1])  # type: ignore[arg-type]
    except Exception:  # the node after the last recorded one fails; it is found below
        pass
    for fx_node in network.graph.nodes:  # type: ignore[union-attr]
        if fx_node.op != "call_module":
            continue
        node = next(names)
        if fx_node not in seen:
            return f", first at {node}, which fails"
        actual, original = seen[fx_node], expected.get(node.output)
        if original is None or not isinstance(actual, Tensor) or original.size != actual.numel():
            continue
        if not np.allclose(actual.numpy().reshape(-1), original.reshape(-1), rtol=1e-3, atol=1e-4):
            return f", first at {node}"
    return ""
