"""`Verdict`, the result of `verify`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .falsify import Witness


@dataclass(frozen=True)
class CaseResult:
    """Result for one case of a property.

    Attributes:
        status: "verified", "violated" or "unknown".
        margin: Minimum over the case's polytopes of the maximum over their rows of (lower bound of a.y) - b, in units
            of the outputs; not above the margin of any point that was evaluated; -inf if no method gave a bound.
        method: Method that settled the case: a bound method or "split"; for a violation "PGD", "corner" or "split"; ""
            for an unknown case.
    """

    status: str
    margin: float
    method: str


@dataclass(frozen=True, eq=False)
class Verdict:
    """Result of `verify`.

    Attributes:
        status: "verified": no input of the property's boxes has an unsafe output. "violated": the witness has one.
            "unknown": neither was shown.
        margin: Least margin of the cases: positive if and only if every case is verified; inf if there is no case.
        seconds: Wall time.
        method: The last of the methods that settled a case, or the one that found the witness; "" if unknown.
        witness: The counterexample, or None.
        cases: Result for each case.
        reasons: Messages: why methods failed or were distrusted, and why the search ended.
    """

    status: str
    margin: float
    seconds: float
    method: str
    witness: Witness | None
    cases: tuple[CaseResult, ...]
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as a dict that JSON can hold; an infinite margin becomes None."""
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
