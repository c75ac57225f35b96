"""`inspect_onnx`: the content of an ONNX file, the result of its import, and the methods that can bound it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch

from ..domain.perturbation import PerturbationLpNorm
from ..engine import BoundedTensor
from ..engine.limits import Deadline, OutOfTime, memory_limit, spare_memory
from ..errors import OnnxError
from ..module.bounded_module import BoundedModule
from . import ImportedModel, load_onnx
from .graph import shape_of
from .reading import opset_of, read_onnx

METHODS = ("IBP", "CROWN-IBP", "CROWN", "lipschitz", "bcp", "bcp-crown")
_EPS = 1e-3  # radius in a trial, in units of the input


@dataclass(frozen=True)
class Trial:
    """Trial of a bound method on a network, over a ball of radius 1e-3 around a random input.

    Attributes:
        method: Name of the method.
        norm: p of the ball, 2 or inf.
        bounded: Whether the method gave finite bounds.
        seconds: Wall time without tracing.
        reason: Why the method gave no finite bounds, or "".
        fallbacks: Name -> class of the nodes without a rule, which were bounded by interval arithmetic.
    """

    method: str
    norm: float
    bounded: bool
    seconds: float
    reason: str = ""
    fallbacks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_onnx`.

    Attributes:
        opset: Version of ONNX's standard operations.
        producer: Name and version of the exporter, as stated in the file.
        ops: Operation -> number of nodes.
        inputs: Name -> shape of each input; None for a size that the file leaves open.
        outputs: Name -> shape of each output; None for a size that the file leaves open.
        nodes: (operation, name, shape of the first output or None) of every node.
        parameters: Number of weights.
        model: The imported network; None if the importer refuses it.
        refusal: Why the importer refuses the network, or "".
        trials: Trials of the bound methods.
    """

    opset: int
    producer: str
    ops: dict[str, int]
    inputs: dict[str, tuple[int | None, ...]]
    outputs: dict[str, tuple[int | None, ...]]
    nodes: tuple[tuple[str, str, tuple[int | None, ...] | None], ...]
    parameters: int
    model: ImportedModel | None
    refusal: str
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as a dict that JSON can hold."""
        names = ("opset", "producer", "ops", "inputs", "outputs", "nodes", "parameters", "refusal")
        report: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.model is not None:
            parts = ("input_shape", "output_shape", "layout", "batch_size", "rewrites")
            report |= {name: getattr(self.model, name) for name in parts} | {"check": asdict(self.model.check)}
        report["trials"] = [asdict(trial) | {"norm": f"{trial.norm:g}"} for trial in self.trials]
        return report


def inspect_onnx(
    source: str | Path | bytes,
    methods: Sequence[str] = METHODS,
    *,
    timeout: float = 30.0,
    max_bytes: int = 2**29,
    **options: Any,
) -> Inspection:
    """Read an ONNX file, import it, and try bound methods on a small l2 and a small l-infinity ball.

    Args:
        source: Path of a ``.onnx`` or ``.onnx.gz`` file, or its bytes.
        methods: Bound methods to try, default `METHODS`; an empty sequence for no trial.
        timeout: Seconds of wall time for each method and norm, default 30.
        max_bytes: Largest allowed size of the file, unpacked, default 512 MiB.
        **options: Further arguments of `lirpa_ext.load_onnx`.

    Returns:
        The inspection; a refusal of the importer is a part of it, not an error.

    Raises:
        DataError: The file cannot be read.
    """
    file = read_onnx(source, max_bytes)
    weights = {tensor.name for tensor in file.graph.initializer}
    model, refusal, trials = None, "", []
    try:
        model = load_onnx(source, max_bytes=max_bytes, **options)
        trials = _try(model, methods, timeout)
    except OnnxError as error:
        refusal = str(error)
    return Inspection(
        opset_of(file), f"{file.producer_name} {file.producer_version}".strip(),
        dict(Counter(node.op_type for node in file.graph.node).most_common()),
        {value.name: shape_of(value) for value in file.graph.input if value.name not in weights},
        {value.name: shape_of(value) for value in file.graph.output}, tuple(_nodes(file)),
        sum(math.prod(tensor.dims) for tensor in file.graph.initializer), model, refusal, tuple(trials),
    )  # fmt: skip


def _nodes(file: onnx.ModelProto) -> list[tuple[str, str, tuple[int | None, ...] | None]]:
    try:
        inferred = onnx.shape_inference.infer_shapes(file).graph
    except Exception:  # onnx raises several types; the shapes stay unknown
        inferred = file.graph
    shapes = {value.name: shape_of(value) for value in [*inferred.value_info, *inferred.output]}
    return [(node.op_type, node.name or node.output[0], shapes.get(node.output[0])) for node in file.graph.node]


def _try(model: ImportedModel, methods: Sequence[str], timeout: float) -> list[Trial]:
    x = torch.rand(1, *model.input_shape, generator=torch.Generator().manual_seed(0))
    graph = BoundedModule(model, x) if methods else None
    trials = []
    for method in methods:
        for norm in (2.0, math.inf):
            ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=_EPS))
            start, reason = time.monotonic(), ""
            fallbacks: dict[str, str] = {}
            try:
                with Deadline(start + timeout), memory_limit(spare_memory()), torch.no_grad():
                    result = graph.bound((ball,), None, method)  # type: ignore[union-attr]
                fallbacks = result.fallbacks if method in ("bcp", "bcp-crown") else {}
                if not all(bound is not None and bound.isfinite().all() for bound in result):
                    reason = "its bounds are not finite"
            except OutOfTime:
                reason = f"took more than {timeout:g} s"
                graph = BoundedModule(model, x)  # a graph that was interrupted is in an undefined state
            except Exception as error:  # the engine raises whatever comes
                first = (str(error).splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first}".rstrip(": ")[:300]
                graph = BoundedModule(model, x)
            trials.append(Trial(method, norm, not reason, time.monotonic() - start, reason, fallbacks))
    return trials
