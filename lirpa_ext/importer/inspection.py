"""`inspect_onnx`: what is in an ONNX file, what the importer makes of it, and which methods can bound it."""

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
_EPS = 1e-3  # of the trial, in units of the input


@dataclass(frozen=True)
class Trial:
    """A method tried on a network.

    Attributes:
        method: Its name.
        norm: Of the perturbation set, 2 or inf.
        bounded: Whether it gave finite bounds.
        seconds: Wall time, the tracing not counted.
        reason: Why it gave none.
        fallbacks: Nodes that were bounded by interval arithmetic for want of a rule, class by name.
    """

    method: str
    norm: float
    bounded: bool
    seconds: float
    reason: str = ""
    fallbacks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What `inspect_onnx` found.

    Attributes:
        opset: Version of the standard operations.
        producer: The exporter, as the file tells.
        ops: Number of nodes by operation.
        inputs: Shape by name, None for a size that the file leaves open.
        outputs: Likewise.
        nodes: (operation, name, shape of its first output where known) of every node.
        parameters: Number of weights.
        model: The imported network, None if it is refused.
        refusal: Why it is.
        trials: What each method made of it.
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
        """In types that JSON has."""
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
    """Look into an ONNX file, import it, and try methods on a small l2 and a small l-infinity ball.

    Args:
        source: As in `lirpa_ext.load_onnx`.
        methods: To be tried; none for the file alone.
        timeout: Seconds for each method and norm, default 30.
        max_bytes: As in `lirpa_ext.load_onnx`.
        **options: Further ones of `lirpa_ext.load_onnx`.

    Returns:
        What was found; a refusal by the importer is a part of that.

    Raises:
        DataError: The file cannot be read at all.
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
    except Exception:  # onnx has several; the shapes are then not told
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
                graph = BoundedModule(model, x)  # one that stopped half-way may hold anything
            except Exception as error:  # the engine raises whatever comes
                first = (str(error).splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first}".rstrip(": ")[:300]
                graph = BoundedModule(model, x)
            trials.append(Trial(method, norm, not reason, time.monotonic() - start, reason, fallbacks))
    return trials
