"""`verify`: does a network have a property? Attack, then bound by one method after the other, the cheapest first."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError, InvalidInputError
from .falsify import Judge, Witness, falsify
from .goals import Bounder, Goal
from .limits import Deadline, OutOfTime, is_out_of_memory, memory_limit, spare_memory
from .methods import find_method, known_methods
from .splitting import MOST_INPUTS, split
from .vnnlib import Case, Specification

METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN", "split")
_SPLIT_METHOD = "CROWN"
_RESTARTS = 3
_MOST_BOXES = 64  # bounded at once
_MOST_ELEMENTS = 2**14  # of their inputs


@dataclass(frozen=True)
class CaseResult:
    """What became of a case of the property.

    Attributes:
        status: "verified", "violated" or "unknown".
        margin: The least over its polytopes of the largest over their rows of (lower bound of a.y - b), in units of
            the outputs; -inf where no method gave a bound.
        method: What settled it: a method, "PGD" or "split"; "" if nothing did.
    """

    status: str
    margin: float
    method: str


@dataclass(frozen=True, eq=False)
class Verdict:
    """The answer of `verify`.

    Attributes:
        status: "verified": no input of the property's boxes has an unsafe output. "violated": the witness has.
            "unknown": neither was shown.
        margin: The least of the cases': positive if and only if every one is verified; inf without any.
        seconds: Wall time.
        method: The last method that was needed to settle a case, or "".
        witness: The counterexample, or None.
        cases: What became of each case.
        reasons: Why a method was left for the next one, or nothing more was tried; a sentence each.
    """

    status: str
    margin: float
    seconds: float
    method: str
    witness: Witness | None
    cases: tuple[CaseResult, ...]
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The verdict in types that JSON has; an infinite margin is None."""
        report = {name: getattr(self, name) for name in ("status", "margin", "seconds", "method")}
        report["reasons"] = list(self.reasons)
        report["cases"] = [asdict(case) for case in self.cases]
        for part in (report, *report["cases"]):
            part["margin"] = part["margin"] if math.isfinite(part["margin"]) else None
        if self.witness is not None:
            report["witness"] = {
                "case": self.witness.case,
                "input": self.witness.input.reshape(-1).tolist(),
                "output": self.witness.output.tolist(),
            }
        return report


def verify(
    model: nn.Module,
    specification: Specification,
    *,
    input_shape: tuple[int, ...] | None = None,
    timeout: float | None = None,
    methods: Sequence[str] = METHODS,
    attack: int = 40,
    dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Verify a property of a network, or find a counterexample.

    The first method bounds every case; what it leaves open is attacked by PGD; what that does not break goes through
    the other methods. Bounds of different methods on the same case are combined, row by row. A polytope that is a
    conjunction of rows is out of reach if one row is. "split" halves the boxes of cases with at most 12 inputs that
    vary, bounding them by CROWN.

    *verified* holds for every real input of the boxes as the file states them, and for the network in real arithmetic
    up to what the methods' own floating-point rounding loses; a few units in the last place are taken off each bound,
    and a margin of 0 or NaN verifies nothing. *violated* means that the witness lies in the box exactly, and is unsafe
    both in float64 and as the network runs: in onnxruntime for one of `lirpa_ext.load_onnx`, else in float32.

    Args:
        model: The network, (B, ...) -> (B, outputs); in eval mode. It is copied, not changed.
        specification: From `lirpa_ext.load_vnnlib`. X counts the inputs of one sample in C order.
        input_shape: Shape of one sample; default the model's `input_shape`, else (inputs,).
        timeout: Seconds of wall time, default no limit. It is looked at between any two torch functions of the
            search, not while a graph is built.
        methods: Of `BoundedModule.compute_bounds`, and "split"; the cheapest first.
        attack: Steps of PGD, default 40; 0 for no attack.
        dtype: Of the bounds: torch.float64, or torch.float32, in whose rounding a small margin means little.
        max_memory: Bytes that bounding may take beyond what the process has, default half of what is free. A method
            that asks for more is left for the next one.
        seed: Of the attack.

    Returns:
        The verdict.

    Raises:
        DataError: Numbers of inputs or outputs of property and network differ.
        InvalidInputError: The network fails on an input of that shape, or an argument is out of range.
        UnknownMethodError: There is no such method.

    Example:
        >>> from lirpa_ext import load_vnnlib
        >>> text = '''(declare-const X_0 Real) (declare-const Y_0 Real)
        ... (assert (<= -1 X_0 1)) (assert (<= Y_0 -0.5))'''
        >>> verdict = verify(nn.ReLU(), load_vnnlib(text))
        >>> verdict.status, round(verdict.margin, 6), verdict.method
        ('verified', 0.5, 'IBP')
    """
    start = time.monotonic()
    if timeout is not None and not timeout > 0:
        raise InvalidInputError(f"timeout must be positive, in seconds, got {timeout}")
    if attack < 0 or dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"attack must not be negative, dtype torch.float32 or float64; got {attack}, {dtype}")
    for method in methods:
        if method != "split" and method.lower() not in map(str.lower, known_methods()):
            find_method(method)  # raises
    if max_memory is None:
        max_memory = spare_memory()
    shape = input_shape or getattr(model, "input_shape", None) or (specification.inputs,)
    run = _Run(model, specification, tuple(shape), dtype, max_memory, start + (timeout or math.inf), seed)
    run.all_methods(list(methods), attack)
    return run.verdict(time.monotonic() - start)


class _Open:
    """A case, and what is known of it: the best bounds so far (U,) of its goal's rows."""

    def __init__(self, index: int, case: Case) -> None:
        self.index, self.case, self.goal = index, case, Goal(case)
        self.lower = np.full(len(self.goal.rows), -np.inf)
        self.margin, self.method = -math.inf, ""
        self.witness: Witness | None = None

    @property
    def open_rows(self) -> np.ndarray:
        """Indices of the rows that are still needed."""
        return self.goal.open_rows(self.lower)

    def result(self) -> CaseResult:
        status = "violated" if self.witness else "verified" if self.margin > 0 else "unknown"
        return CaseResult(status, self.margin, self.method)


class _Run:
    """One call of `verify`: the network in the forms that are needed, the cases, and what is told of them."""

    def __init__(
        self,
        model: nn.Module,
        specification: Specification,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        max_memory: int | None,
        end: float,
        seed: int,
    ) -> None:
        if math.prod(shape) != specification.inputs:
            raise DataError(
                f"the property has {specification.inputs} inputs X, the network takes {math.prod(shape)} {shape}: "
                "they do not belong together, or input_shape is missing"
            )
        networks = {kind: _copy(model, kind) for kind in (torch.float64, torch.float32)}
        case = next(iter(specification.cases), None)
        x = np.zeros(specification.inputs) if case is None else case.inner_lower
        for kind, network in networks.items():
            try:
                with torch.no_grad():
                    y = network(torch.from_numpy(x).to(kind).view(1, *shape))
            except Exception as error:  # whatever a user's model raises
                raise InvalidInputError(f"the network fails on an input of shape {(1, *shape)}: {error}") from error
            if y.numel() != specification.outputs:
                raise DataError(f"the property has {specification.outputs} outputs Y, the network gives {y.numel()}")
            networks[kind] = network if y.dim() == 2 else _Rows(network)

        def exact(points: Tensor) -> Tensor:
            return networks[torch.float64](points.view(len(points), *shape))

        def original(sample: np.ndarray) -> np.ndarray:
            if reference is not None:
                return reference(sample[None])[0]
            with torch.no_grad():
                return networks[torch.float32](torch.from_numpy(sample[None]).float())[0].numpy()

        reference = getattr(model, "reference", None)
        self.judge = Judge(exact, original, shape)
        self.bounder = Bounder(networks[dtype], shape, dtype, getattr(model, "batch_size", None) is None)
        self.cases = [_Open(index, case) for index, case in enumerate(specification.cases)]
        self.max_memory, self.end, self.seed = max_memory, end, seed
        self.last = ""  # what settled a case last
        self.reasons: list[str] = []
        if specification.vacuous:
            self.reasons.append(f"{specification.vacuous} disjuncts of the property have an empty box and hold of it")

    def all_methods(self, methods: list[str], attack: int) -> None:
        """Bound by the first method, attack, bound by the others, until every case is settled or one is violated."""
        self._bound_all(methods[:1])
        if attack:
            self._attack(attack)
        self._bound_all(methods[1:])

    def verdict(self, seconds: float) -> Verdict:
        """The outcome so far."""
        results = tuple(case.result() for case in self.cases)
        statuses = {result.status for result in results}
        status = next((status for status in ("violated", "unknown") if status in statuses), "verified")
        margin = min((result.margin for result in results), default=math.inf)
        witness = next((case.witness for case in self.cases if case.witness), None)
        method = "" if status == "unknown" or not results else self.last
        return Verdict(status, margin, seconds, method, witness, results, tuple(self.reasons))

    def _open(self) -> list[_Open]:
        """The cases still to be settled: none once one is violated."""
        if any(case.witness for case in self.cases):
            return []
        return [case for case in self.cases if not case.margin > 0]

    def _bound_all(self, methods: Sequence[str]) -> None:
        for method in methods:
            if not self._open():
                return
            if time.monotonic() > self.end:
                self.reasons.append(f"time ran out before {method}")
                return
            if method == "split":
                self._split()
                continue
            groups: dict[bytes, list[_Open]] = {}  # what asks for the same rows is bounded together
            for case in self._open():
                groups.setdefault(case.goal.rows[case.open_rows].tobytes(), []).append(case)
            most = max(1, min(_MOST_BOXES, _MOST_ELEMENTS // math.prod(self.judge.input_shape)))
            chunks = [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
            if not all(self._bound(method, chunk) for chunk in chunks):
                continue

    def _bound(self, method: str, cases: list[_Open]) -> bool:
        """Bound some cases that have the same open rows; False if the method is to be left."""
        rows = [case.open_rows for case in cases]
        lower, upper = (np.stack(ends) for ends in zip(*((c.case.lower, c.case.upper) for c in cases), strict=True))
        try:
            with Deadline(self.end), memory_limit(self.max_memory):
                bounds = self.bounder.lower(method, lower, upper, cases[0].goal.rows[rows[0]])
        except Exception as error:  # the engine raises whatever comes
            if is_out_of_memory(error) and len(cases) > 1:
                half = len(cases) // 2
                return self._bound(method, cases[:half]) and self._bound(method, cases[half:])
            self._tell(f"{method} gave up on case {cases[0].index}", error)
            return False
        for case, index, bound in zip(cases, rows, bounds, strict=True):
            case.lower[index] = np.maximum(case.lower[index], bound)
            self._settle(case, float(case.goal.margins(case.lower).min()), method)
        return True

    def _attack(self, steps: int) -> None:
        """PGD on every open case, for a quarter of the time at most."""
        now = time.monotonic()
        end = now + (self.end - now) / 4
        try:
            with Deadline(end), memory_limit(self.max_memory):
                for case in self._open():
                    reachable = case.goal.margins(case.lower) <= 0
                    unsafe = [polytope for polytope, open_ in zip(case.case.unsafe, reachable, strict=True) if open_]
                    found = falsify(self.judge, case.index, case.case, unsafe, steps, _RESTARTS, self.seed)
                    if found is not None:
                        self._violate(case, found, "PGD")
                        return
        except Exception as error:  # the user's model, or onnxruntime
            self._tell("the attack stopped", error, end)

    def _split(self) -> None:
        for case in self._open():
            varying = int((case.case.inner_lower < case.case.inner_upper).sum())
            if varying > MOST_INPUTS:
                self.reasons.append(f"no split of case {case.index}: {varying} of its inputs vary, over {MOST_INPUTS}")
                continue
            try:
                with Deadline(self.end), memory_limit(self.max_memory):
                    outcome = split(
                        self.bounder, self.judge, case.index, case.case, case.goal, case.lower, _SPLIT_METHOD
                    )
            except Exception as error:  # the engine raises whatever comes
                self._tell(f"split gave up on case {case.index}", error)
                continue
            if outcome.cause:
                self.reasons.append(f"split of case {case.index}: {outcome.cause}")
            if outcome.witness is not None:
                self._violate(case, outcome.witness, "split")
                return
            self._settle(case, outcome.margin, "split")

    def _settle(self, case: _Open, margin: float, method: str) -> None:
        case.margin = max(case.margin, margin)
        if case.margin > 0:
            case.method = self.last = method

    def _violate(self, case: _Open, witness: Witness, method: str) -> None:
        case.witness, case.method, self.last = witness, method, method

    def _tell(self, what: str, error: Exception, end: float | None = None) -> None:
        """Note why something stopped."""
        if isinstance(error, OutOfTime) or time.monotonic() > (end or self.end):
            cause = "out of time"
        elif is_out_of_memory(error):
            cause = "out of memory"
        else:
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        self.reasons.append(f"{what}: {cause}")


class _Rows(nn.Module):
    """A network whose outputs are made a vector."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, outputs)."""
        return self.network(x).reshape(x.shape[0], -1)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    try:
        return copy.deepcopy(model).to("cpu", dtype).eval().requires_grad_(False)
    except Exception as error:  # whatever a user's model raises
        raise InvalidInputError(f"{type(model).__name__} cannot be copied as {dtype}: {error}") from error
