"""The answer of `verify`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .falsify import Witness


@dataclass(frozen=True)
class CaseResult:
    """What became of a case of the property.

    Attributes:
        status: "verified", "violated" or "unknown".
        margin: The least over its polytopes of the largest over their rows of (lower bound of a.y - b), in units of
            the outputs; at most what a point of the box has; -inf where no method gave a bound.
        method: What settled it: a method or "split"; of a violation "PGD", "corner" or "split"; "" if nothing did.
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
