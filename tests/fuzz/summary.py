"""What a session counts, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lirpa_ext import engine

from .case import Case
from .check import FAILURES, Outcome

_SHOWN = ("held", "nan", "refused", "violated", "caught", "raw", "slow")
STATUSES = (*_SHOWN, "outside")


@dataclass
class Finding:
    """Failures of one cause, as far as can be told.

    Attributes:
        status: One of `check.FAILURES`.
        kinds: Kinds of steps that are left of the network.
        message: Of the first one.
        seed: Of the first one's case.
        program: That reproduces it.
        methods: How many calls of each method failed so.
    """

    status: str
    kinds: tuple[str, ...]
    message: str
    seed: int
    program: str
    methods: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(self.methods.values())


@dataclass
class Summary:
    """What a session did.

    Attributes:
        graphs: Networks drawn.
        calls: Outcomes, by method and status; what the build alone decides has the method "build".
        steps: Networks in which each kind of step occurred.
        nodes: Networks in which each class of the engine's nodes occurred, on the way of a perturbation.
        refusals: Refused calls, by method and reason.
        excused: Calls in which rounding excused an entry.
        findings: Failures, by status, kinds and cause.
    """

    graphs: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    excused: int = 0
    findings: dict[tuple[str, tuple[str, ...], str], Finding] = field(default_factory=dict)

    def add(self, case: Case, outcomes: list[Outcome], nodes: Collection[str]) -> None:
        """Count a case."""
        self.graphs += 1
        self.steps.update(case.network.kinds)
        self.nodes.update(nodes)
        for outcome in outcomes:
            self.calls[outcome.method, outcome.status] += 1
            self.excused += outcome.excused > 0
            if outcome.status == "refused":
                self.refusals[outcome.method, outcome.cause] += 1

    def count(self, *statuses: str) -> int:
        """Calls and builds with one of those outcomes."""
        return sum(number for (_, status), number in self.calls.items() if status in statuses)

    @property
    def failed(self) -> bool:
        return self.count(*FAILURES) > 0

    @property
    def attacked(self) -> int:
        """Bounds that were held against points."""
        return self.count("held", "nan", "violated", "caught") - self.calls["build", "violated"]

    def alike(self, outcome: Outcome) -> Finding | None:
        """A finding with the same raw error, once it is frequent enough to spare the shrinking."""
        for (status, _, cause), finding in self.findings.items():
            if status == outcome.status == "raw" and cause == outcome.cause and finding.count > 2:
                return finding
        return None

    def table(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        methods: dict[str, dict[str, int]] = {}
        for (method, status), number in sorted(self.calls.items()):
            methods.setdefault(method, {})[status] = number
        return {
            "engine": engine.engine_version(),
            "graphs": self.graphs,
            "attacked": self.attacked,
            "within_rounding": self.excused,
            **{status: self.count(status) for status in STATUSES},
            "methods": methods,
            "steps": dict(self.steps.most_common()),
            "nodes": dict(self.nodes.most_common()),
            "refusals": [[method, cause, number] for (method, cause), number in self.refusals.most_common()],
            "findings": [vars(finding) for finding in self.findings.values()],
        }

    def text(self) -> str:
        """What is printed at the end."""
        causes: Counter[str] = Counter()
        for (_, cause), number in self.refusals.items():
            causes[cause] += number
        lines = [
            "refusals, most frequent first:",
            *(f"{number:6} {cause}" for cause, number in causes.most_common(25)),
            "",
            f"{len(self.steps)} kinds of steps, {len(self.nodes)} classes of nodes: {', '.join(sorted(self.nodes))}",
            "",
            f"{'method':26}" + "".join(f"{status:>10}" for status in _SHOWN),
        ]
        for method in sorted({method for method, _ in self.calls}):
            counts = (self.calls[method, status] for status in _SHOWN)
            lines.append(f"{method:26}" + "".join(f"{number:>10}" for number in counts))
        lines += [
            "",
            f"auto_LiRPA {engine.engine_version()}: {self.graphs} networks, {self.attacked} bounds attacked. "
            f"{self.count('violated')} violated, {self.count('caught')} more that the package caught itself, "
            f"{self.count('raw')} raw errors.",
            f"{self.count('refused')} refused, {self.count('nan')} with NaN, {self.excused} touched within rounding, "
            f"{self.count('slow')} slow, {self.count('outside')} refused by the exporter or the engine's own class.",
        ]
        for finding in sorted(self.findings.values(), key=lambda finding: -finding.count):
            lines.append(
                f"{finding.count:6} {finding.status}: {', '.join(finding.methods)} on "
                f"{', '.join(finding.kinds) or 'the input'} (seed {finding.seed}): {finding.message}"
            )
        return "\n".join(lines)
