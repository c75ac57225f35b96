"""One case: every call's outcome."""

from __future__ import annotations

import contextlib
import copy
import re
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch imports it when an optimizer is first made: not then, where Slow may strike
from torch import Tensor

from lirpa_ext.errors import LirpaExtError, SoundnessError

from .attack import OUTWARD, SUMS, Attack, Found, rounding
from .case import OURS, Call, Case, execute

FAILURES = ("violated", "caught", "raw")
_SECONDS = 20  # of one call


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        status: "held", "nan" (held where it is a number), "violated", "caught" (violated, and the package says so),
            "refused", "raw" (an error that is not the package's), "outside" (one of the exporter or of the engine's own
            class, before the package is asked) or "slow".
        call: The call; None for what the build alone decides.
        message: Of the error, or what is violated.
        point: Where, (1, ...) float64, for one that is violated by a value.
        sample: Of the batch.
        entry: Of the bound.
        excused: Entries that rounding excuses.
    """

    status: str
    call: Call | None = None
    message: str = ""
    point: Tensor | None = None
    sample: int = 0
    entry: int = 0
    excused: int = 0

    @property
    def failed(self) -> bool:
        return self.status in FAILURES

    @property
    def method(self) -> str:
        return "build" if self.call is None else self.call.method

    @property
    def cause(self) -> str:
        """The message without what differs from network to network."""
        first = self.message.strip().split("\n")[0]
        first = re.sub(r"(BoundedModule|Net|ImportedModel)\b", "model", first)
        return re.sub(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", "N", re.sub(r"'?/[\w./:-]+'?", "NODE", first))[:110]


class Slow(Exception):
    """A call took too long."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Slow in what takes more processor time (main thread only)."""

    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(case: Case, nodes: set[str] | None = None) -> list[Outcome]:
    """Build the graph, run every call, and attack what it returns.

    Args:
        case: The case.
        nodes: Takes the classes of the graph's nodes that depend on a perturbed input.
    """
    truth = Truth(case)
    if not truth.finite:
        return [Outcome("outside", None, "the model is not finite at the clean point")]
    try:
        with limited(_SECONDS):
            names = case.run()
    except Exception as error:
        return [_of_error(error, None)]
    if case.network.mixes and case.way != "register" and truth.reads_others():
        return [Outcome("violated", None, "samples read each other, and the graph was built")]
    truth.use(names)
    outcomes: list[Outcome] = []
    for call in case.calls:
        outcomes.append(_outcome(case, call, names, truth))
        if outcomes[-1].status == "slow":  # what was interrupted may have left the graph half changed
            break
    if nodes is not None:
        graph = names["bounded"]._modules.values()
        nodes |= {type(node).__name__ for node in graph if getattr(node, "perturbed", False)}
    return outcomes


def _of_error(error: Exception, call: Call | None) -> Outcome:
    if isinstance(error, Slow):
        return Outcome("slow", call)
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SoundnessError):
        return Outcome("caught", call, message)
    if isinstance(error, LirpaExtError):
        return Outcome("refused", call, message)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lirpa_ext/" in frame.filename]
    ours = any(
        (Path(frame.filename).name, frame.name) != ("register.py", "init") for frame in frames
    )  # it only calls on
    return Outcome("raw" if ours else "outside", call, message)


def _outcome(case: Case, call: Call, names: dict[str, Any], truth: Truth) -> Outcome:
    try:
        with limited(_SECONDS):
            execute(call.source(), names)
    except Exception as error:
        return _of_error(error, call)
    return truth.judge(call, names["lower"], names["upper"])


class Truth:
    """What a case's network does on its set."""

    def __init__(self, case: Case) -> None:
        self.case, self.network = case, case.network
        self.x = case.inputs()
        self.region = case.ball.region(self.x, case.sample, case.dtype)
        self.clean = self.x.double()
        self.lines = self.model = case.model()
        with torch.no_grad():
            output = self.model(self.clean)
        self.shape = tuple(output.shape)
        self.finite = bool(torch.isfinite(output).all())
        self._found: Found | None = None

    def use(self, names: dict[str, Any]) -> None:
        """Take the imported network, which has rounded weights of its own, and the rows, from what a case ran."""
        if self.case.way == "onnx":
            imported = names["model"]
            self.model = copy.deepcopy(imported, {id(imported.reference): imported.reference}).double()
            self.shape = tuple(self.model(self.clean).shape)
        outputs = self.clean.new_zeros(self.shape)[0].numel()
        rows = torch.eye(outputs, dtype=torch.float64).expand(len(self.x), -1, -1)
        self.outputs = outputs
        if "C" in names:
            rows = torch.cat([rows, names["C"].double().expand(len(self.x), -1, -1)], 1)
        self.rows, self.labels = rows, names.get("labels")

    @property
    def found(self) -> Found:
        if self._found is None:
            attack = Attack(self.model, self.clean, self.region, self.rows, self.network.mixes, self.labels)
            self._found = attack.search()
        return self._found

    def reads_others(self) -> bool:
        """Whether the first sample's output moves when others do."""
        with torch.no_grad():
            pairs = [torch.cat([self.clean[:1], other]) for other in (self.clean[:1] + 1, -2 * self.clean[:1] - 0.5)]
            one, two = (self.model(pair)[0] for pair in pairs)
        return bool(torch.isfinite(one - two).all()) and not torch.allclose(one, two, rtol=1e-6, atol=1e-12)

    def judge(self, call: Call, lower: Any, upper: Any) -> Outcome:
        """Compare bounds with what was found."""
        first, last = (self.outputs, self.rows.shape[1]) if call.rows else (0, self.outputs)
        first, last = (self.rows.shape[1], self.rows.shape[1] + 1) if call.fused else (first, last)
        expected = (len(self.x), last - first) if call.rows or call.fused else self.shape
        status, excused = "held", 0
        for side, bound, sign in (("lower", lower, 1), ("upper", upper, -1)):
            if not getattr(call, side):
                continue
            if not isinstance(bound, Tensor):
                return Outcome("violated", call, f"{side} bound is {type(bound).__name__}")
            if tuple(bound.shape) != expected:
                return Outcome("violated", call, f"{side} bound has shape {tuple(bound.shape)} for {expected}")
            bound = bound.detach().double().reshape(len(self.x), -1)
            status = "nan" if bound.isnan().any() else status
            values, points = (
                (self.found.smallest, self.found.at_smallest)
                if sign > 0
                else (self.found.largest, self.found.at_largest)
            )
            values, points = values[:, first:last], points[:, first:last]
            excess = torch.where(torch.isfinite(values), sign * (bound - values), -torch.inf).nan_to_num(nan=-torch.inf)
            for position in (excess > 0).nonzero().tolist():
                sample, entry = position
                off = float(excess[sample, entry]), float(values[sample, entry])
                row = int(self.labels[sample]) if call.fused else self.rows[sample, first + entry]
                if self._excused(call, *off, row, sample, points[sample, entry]):
                    excused += 1
                    continue
                message = (
                    f"{side} bound {float(bound[sample, entry]):.9g} of entry {entry}, where the value is "
                    f"{float(values[sample, entry]):.9g}"
                )
                return Outcome("violated", call, message, points[sample, entry][None], sample, entry)
        return Outcome(status, call, excused=excused)

    def _excused(self, call: Call, excess: float, value: float, row: Tensor | int, sample: int, point: Tensor) -> bool:
        dtype = getattr(torch, self.case.dtype)
        outward = call.method in OURS and dtype == torch.float64
        sums = OUTWARD if outward else SUMS[dtype]
        if excess <= sums * abs(value):
            return True
        ends = (point[None], self.clean[sample : sample + 1])
        return excess <= max(rounding(self.network, self.lines, row, end, dtype, sums) for end in ends)
