"""The loop: cases are drawn, checked and counted, failures made small and printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TextIO

from .case import Case
from .check import Outcome, check
from .drawing import draw_case
from .shrink import fails_alike, reproduction, shrink
from .summary import Finding, Summary
from .tables import remember_tables


def run(
    seconds: float,
    seed: int,
    methods: Collection[str] | None = None,
    allowed: Callable[[str], bool] | None = None,
    graphs: int | None = None,
    out: TextIO = sys.stdout,
    shrinking: float = 15.0,
) -> Summary:
    """Draw and check cases until the time is over.

    Args:
        seconds: Limit; failures may take up to half of it.
        seed: Case k of the session has the seed `seed` + k.
        methods: The only methods to call; default all.
        allowed: Which operations (by the name of their function) a network may have; default all.
        graphs: Or stop after so many networks.
        out: Takes the programs of failures.
        shrinking: Limit for one failure, in seconds of processor time.
    """
    remember_tables()
    summary, start, spent = Summary(), time.monotonic(), 0.0
    while time.monotonic() - start < seconds and (graphs is None or summary.graphs < graphs):
        number = seed + summary.graphs
        case, nodes = draw_case(number, methods, allowed), set[str]()
        outcomes = check(case, nodes)
        summary.add(case, outcomes, nodes)
        failed = [outcome for outcome in outcomes if outcome.failed]
        before = time.monotonic()
        while failed:
            left = min(shrinking, seconds / 2 - spent - (time.monotonic() - before))
            failed = _explained(summary, number, case, failed, left, out)
        spent += time.monotonic() - before
    return summary


def _explained(
    summary: Summary, seed: int, case: Case, failed: list[Outcome], seconds: float, out: TextIO
) -> list[Outcome]:
    """Record the first of a case's failures with all that fail alike on the same small program; return the others."""
    first = failed[0]
    finding, small = summary.alike(first), case
    if finding is None:
        outcome = first
        if seconds > 0:
            small, outcome = shrink(case, first, seconds)
        kinds = small.network.kinds if seconds > 0 else ("not made small",)
        key = (outcome.status, kinds, outcome.cause if outcome.status == "raw" else "")
        if key not in summary.findings:
            message = outcome.message.strip().split("\n")[0][:200]
            summary.findings[key] = Finding(outcome.status, kinds, message, seed, reproduction(small, outcome))
            print(f"--- seed {seed}, {first.method}\n{summary.findings[key].program}", file=out, flush=True)
        finding = summary.findings[key]
    others = []
    for outcome in failed:
        if outcome is first or summary.alike(outcome) is finding or (seconds > 0 and _fails(small, outcome)):
            finding.methods[outcome.method] += 1
        else:
            others.append(outcome)
    return others


def _fails(small: Case, outcome: Outcome) -> bool:
    return outcome.call is not None and fails_alike(replace(small, calls=(outcome.call,)), outcome) is not None
