"""The work behind `verify`: cases with their evidence, and the methods and attacks that are tried on open cases."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..domain.perturbation import PerturbationLpNorm
from ..engine.limits import Deadline, OutOfTime, is_out_of_memory, memory_limit
from ..errors import (
    DataError,
    EstimateError,
    InvalidInputError,
    OptionError,
    SoundnessError,
    TrainModeError,
    UnknownMethodError,
)
from ..module import guard
from .evidence import Evidence, looking
from .falsify import Judge, Witness, falsify
from .goals import Bounder
from .splitting import MOST_INPUTS, split
from .verdict import CaseResult, Verdict
from .vnnlib import Case, Specification

_SPLIT_METHOD = "CROWN"
_RESTARTS = 3
_MOST_BOXES = 64  # boxes bounded together
_MOST_ELEMENTS = 2**14  # numbers of their inputs
# Wrong arguments: these errors would occur with every method.
_ARGUMENTS = (EstimateError, InvalidInputError, OptionError, TrainModeError, UnknownMethodError)


class _Open:
    """A case with its evidence, and a counterexample if one was found."""

    def __init__(self, index: int, case: Case, dtype: torch.dtype) -> None:
        self.index, self.case, self.evidence = index, case, Evidence(case, dtype)
        self.name = f"case {index}"
        self.inner = case.inner_lower, case.inner_upper
        self.center = np.clip(case.inner_lower + (case.inner_upper - case.inner_lower) / 2, *self.inner)
        self.witness: Witness | None = None
        self.falsifier = ""  # name of the attack that found the witness

    @property
    def open_rows(self) -> np.ndarray:
        """Indices of the rows of polytopes that are not yet shown to be out of reach."""
        return self.evidence.goal.open_rows(self.evidence.lower)

    @property
    def settled(self) -> bool:
        return self.witness is not None or self.evidence.margin > 0

    def result(self) -> CaseResult:
        status = "violated" if self.witness else "verified" if self.evidence.margin > 0 else "unknown"
        method = self.falsifier or (self.evidence.method if status == "verified" else "")
        return CaseResult(status, self.evidence.margin, method)


class Verifier:
    """One call of `verify`: the network in float64 and float32, the cases, and the messages.

    Args:
        model: The network, (B, ...) -> (B, outputs). It is copied, not changed.
        specification: The property.
        shape: Shape of one sample.
        dtype: torch dtype of the bounds.
        methods: Bound methods and "split", in this order.
        max_memory: Bytes that bounding may take beyond what the process has; None for no limit.
        end: Time (`time.monotonic`) at which to stop; inf for none.
        seed: Seed of the attack.

    Attributes:
        cases: The cases with their evidence.
        distrusted: Methods, in lower case, of which a point refuted a bound.
        reasons: Messages so far.

    Raises:
        DataError: Numbers of inputs or outputs of the property and the network differ.
        InvalidInputError: The network cannot be copied, or fails on an input.
    """

    def __init__(
        self,
        model: nn.Module,
        specification: Specification,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        methods: list[str],
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

        def single(points: Tensor) -> Tensor:
            return networks[torch.float32](points.float().view(len(points), *shape))

        self.single = single
        self.bounder = Bounder(networks[dtype], shape, dtype, getattr(model, "batch_size", None) is None)
        self.cases = [_Open(index, case, dtype) for index, case in enumerate(specification.cases)]
        self.distrusted: set[str] = set()
        self.methods, self.max_memory, self.end, self.seed = methods, max_memory, end, seed
        self.reasons: list[str] = []
        if specification.vacuous:
            self.reasons.append(f"{specification.vacuous} disjuncts of the property have an empty box and hold of it")

    def all_methods(self, attack: int) -> None:
        """Bound by the first method, attack, then bound by the others, until all cases are settled or one is violated.

        Args:
            attack: Steps of PGD; 0 for no attack.

        Raises:
            LirpaExtError: The arguments of a method are wrong.
        """
        while True:
            distrusted = set(self.distrusted)
            self._bound_all(self.methods[:1])
            if attack:
                self._attack(attack)
            self._bound_all(self.methods[1:])
            if self.distrusted == distrusted:
                return
            # Cases settled by a method that was refuted since are open again, so the other methods are tried anew.

    def verdict(self, seconds: float) -> Verdict:
        """The verdict from the evidence so far, with the wall time of the call in seconds."""
        results = tuple(case.result() for case in self.cases)
        statuses = {result.status for result in results}
        status = next((status for status in ("violated", "unknown") if status in statuses), "verified")
        margin = min((result.margin for result in results), default=math.inf)
        witness = next((case.witness for case in self.cases if case.witness), None)
        used = [result.method for result in results]
        last = next((method for method in reversed(self.methods) if method in used), "")
        falsifier = next((case.falsifier for case in self.cases if case.falsifier), "")
        for case in self.cases:
            if case.witness is None and not case.evidence.finite:
                self.reasons.append(f"the network is not finite at a point of the box of {case.name}")
            elif case.witness is None and case.evidence.worst <= 0:
                self.reasons.append(f"a point of {case.name} is unsafe in float64, but not as the network runs")
        return Verdict(
            status,
            margin,
            seconds,
            falsifier or ("" if status == "unknown" else last),
            witness,
            results,
            tuple(self.reasons),
        )

    def _open(self) -> list[_Open]:
        """The cases that are not settled; none as soon as one case is violated."""
        if any(case.witness for case in self.cases):
            return []
        return [case for case in self.cases if not case.settled]

    def _bound_all(self, methods: Sequence[str]) -> None:
        for method in methods:
            if not self._open():
                return
            if method.lower() in self.distrusted:
                continue
            if time.monotonic() > self.end:
                self.reasons.append(f"time ran out before {method}")
                return
            if method == "split":
                self._split()
                continue
            groups: dict[bytes, list[_Open]] = {}  # cases with the same open rows are bounded together
            for case in self._open():
                groups.setdefault(case.evidence.goal.rows[case.open_rows].tobytes(), []).append(case)
            most = max(1, min(_MOST_BOXES, _MOST_ELEMENTS // math.prod(self.judge.input_shape)))
            chunks = [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
            if not all(self._bound(method, chunk) for chunk in chunks):
                continue

    def _bound(self, method: str, cases: list[_Open]) -> bool:
        """Bound cases that have the same open rows; False if the method should not be tried on further cases."""
        index = [case.open_rows for case in cases]
        rows = cases[0].evidence.goal.rows[index[0]]
        lower, upper = (np.stack(ends) for ends in zip(*((c.case.lower, c.case.upper) for c in cases), strict=True))
        try:
            with Deadline(self.end), memory_limit(self.max_memory):
                self._look_at_centers(cases)
                bounds = self.bounder.lower(method, lower, upper, rows)
                for case, some, bound in zip(cases, index, bounds, strict=True):
                    case.evidence.claim(method, some, bound)
                self._check(cases)
                settled = [i for i, case in enumerate(cases) if case.evidence.margin > 0]
                if settled:
                    self._look_at_corners([cases[i] for i in settled], rows, bounds[settled])
                    self._check(cases)
        except (Exception, OutOfTime) as error:  # the engine raises whatever comes
            for case in cases:  # bounds that were not compared with the corners do not count
                case.evidence.drop(method)
            if isinstance(error, _ARGUMENTS) and not is_out_of_memory(error):
                raise
            if isinstance(error, SoundnessError):
                self._distrust(method, f"{method} on {cases[0].name}: {error}")
                return False
            if is_out_of_memory(error) and len(cases) > 1:
                half = len(cases) // 2
                return self._bound(method, cases[:half]) and self._bound(method, cases[half:])
            self._tell(f"{method} gave up on {cases[0].name}", error)
            return False
        return method.lower() not in self.distrusted and not any(case.witness for case in cases)

    def _look_at_centers(self, cases: list[_Open]) -> None:
        """Add the outputs at the centers of boxes to the evidence, and the scale of rounding errors; once per case."""
        cases = [case for case in cases if not case.evidence.noise]
        if not cases:
            return
        centers = torch.from_numpy(np.stack([case.center for case in cases]))
        with torch.no_grad():
            outputs = self.judge.function(centers)
        for case, output, noise in zip(
            cases, outputs, guard.noise(self.judge.function, self.single, centers), strict=True
        ):
            case.evidence.noise = max(float(noise), 1e-300)
            case.evidence.see(output.unsqueeze(0))

    def _look_at_corners(self, cases: list[_Open], rows: np.ndarray, bounds: np.ndarray) -> None:
        """Add the outputs at corners of boxes that are likely to refute bounds (B, S) of rows (S, outputs)."""
        centers = torch.from_numpy(np.stack([case.center for case in cases]))
        ends = [torch.from_numpy(np.stack(end)) for end in zip(*(case.inner for case in cases), strict=True)]
        matrix = torch.from_numpy(rows).T

        def values(points: Tensor) -> Tensor:
            return self.judge.function(points) @ matrix

        with torch.no_grad():
            chosen = guard.closest(values(centers), torch.from_numpy(bounds))
        for points in guard.extremes(values, centers, PerturbationLpNorm(x_L=ends[0], x_U=ends[1]), chosen, self.seed):
            with torch.no_grad():
                outputs = self.judge.function(points)
            for i, case in enumerate(cases):
                (margin,) = case.evidence.see(outputs[i : i + 1])
                found = self.judge.witness(case.index, case.case, points[i].numpy()) if margin <= 0 else None
                if found is not None:
                    self._violate(case, found, "corner")
                    return

    def _check(self, cases: Sequence[_Open]) -> None:
        """Distrust every method with a bound that a point refutes."""
        for case in cases:
            for method, why in case.evidence.refutations(case.name).items():
                self._distrust(method, why)

    def _distrust(self, method: str, why: str) -> None:
        """Record that a bound of a method was refuted, and drop all its bounds, of all cases."""
        if method.lower() not in self.distrusted:
            self.distrusted.add(method.lower())
            self.reasons.append(why)
        for case in self.cases:
            case.evidence.drop(method)

    def _attack(self, steps: int) -> None:
        """Run PGD on every open case, for at most a quarter of the remaining time."""
        now = time.monotonic()
        end = now + (self.end - now) / 4
        for case in self._open():
            evidence = case.evidence
            reachable = evidence.goal.margins(evidence.lower) <= 0
            unsafe = [polytope for polytope, open_ in zip(case.case.unsafe, reachable, strict=True) if open_]
            try:
                with Deadline(end), memory_limit(self.max_memory):
                    self._look_at_centers([case])
                    function = looking(evidence, self.judge.function)
                    found = falsify(self.judge, case.index, case.case, unsafe, steps, _RESTARTS, self.seed, function)
            except (Exception, OutOfTime) as error:  # the user's model, or onnxruntime
                self._tell(f"the attack on {case.name} stopped", error, end)
                found = None
            self._check([case])
            if found is not None:
                self._violate(case, found, "PGD")
                return
            if time.monotonic() > end:
                return

    def _split(self) -> None:
        for case in self._open():
            varying = int((case.case.inner_lower < case.case.inner_upper).sum())
            if varying > MOST_INPUTS:
                self.reasons.append(f"no split of {case.name}: {varying} of its inputs vary, over {MOST_INPUTS}")
                continue
            if _SPLIT_METHOD.lower() in self.distrusted:
                self.reasons.append(
                    f"no split of {case.name}: {_SPLIT_METHOD}, which bounds the halves, is unsound here"
                )
                continue
            try:
                with Deadline(self.end), memory_limit(self.max_memory):
                    self._look_at_centers([case])
                    outcome = split(self.bounder, self.judge, case.index, case.case, case.evidence, _SPLIT_METHOD)
            except (Exception, OutOfTime) as error:  # the engine raises whatever comes
                if isinstance(error, _ARGUMENTS) and not is_out_of_memory(error):
                    raise
                if isinstance(error, SoundnessError):  # a bound of the case or of a half was refuted
                    self._check([case])
                    self._distrust(_SPLIT_METHOD, f"split of {case.name}: {error}")
                else:
                    self._tell(f"split gave up on {case.name}", error)
                continue
            if outcome.cause:
                self.reasons.append(f"split of {case.name}: {outcome.cause}")
            if outcome.witness is not None:
                self._violate(case, outcome.witness, "split")
                return
            case.evidence.claim_margin(outcome.margin, _SPLIT_METHOD)
            self._check([case])

    def _violate(self, case: _Open, witness: Witness, by: str) -> None:
        case.witness, case.falsifier = witness, by

    def _tell(self, what: str, error: BaseException, end: float | None = None) -> None:
        """Append a message with the cause of an error: out of time, out of memory, or its text."""
        if isinstance(error, OutOfTime) or time.monotonic() > (end or self.end):
            cause = "out of time"
        elif is_out_of_memory(error):
            cause = "out of memory"
        else:
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        self.reasons.append(f"{what}: {cause}")


class _Rows(nn.Module):
    """A network whose output for a sample is flattened to a vector."""

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
