"""A failing case made small, and printed as a program of its own that fails as long as the failure is there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from .case import Ball, Case
from .check import Outcome, check

_DIGITS = (1, 2, 4)
_SIZE = re.compile(r"(?<![\w.])\d+(?![\w.])")


def shrink(case: Case, outcome: Outcome, seconds: float = 15.0) -> tuple[Case, Outcome]:
    """The smallest case found that fails in the same way, with its outcome.

    One simplification at a time, the boldest first, kept if the call still fails with the same status (and, for a raw
    error, the same class of it); from the start again after each success, until none helps or the time is over.

    Args:
        case: The case.
        outcome: Of one of its calls.
        seconds: Limit, of processor time.
    """
    deadline = time.process_time() + seconds
    case = replace(case, calls=() if outcome.call is None else (outcome.call,))
    found = fails_alike(case, outcome)
    if found is None:
        return case, outcome
    tried: set[str] = set()
    progress = True
    while progress:
        progress = False
        for smaller in simpler(case):
            if time.process_time() > deadline:
                return case, found
            text = repr(smaller)
            if text in tried:
                continue
            tried.add(text)
            again = fails_alike(smaller, outcome)
            if again is not None:
                case, found, progress = smaller, again, True
                break
    return case, found


def fails_alike(case: Case, outcome: Outcome) -> Outcome | None:
    """The outcome of the case's only call, if it fails as that one did."""
    try:
        results = check(case)
    except Exception:  # what was simplified is no network any more
        return None
    for found in results:
        if found.status == outcome.status and (found.call is None) == (outcome.call is None):
            kinds = [each.message.partition(":")[0] for each in (found, outcome)]
            if outcome.status != "raw" or kinds[0] == kinds[1]:
                return found
    return None


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler by one step, the boldest steps first."""
    network = case.network
    live = network.live()
    if case.sample is None and case.batch > 1:
        for sample in range(case.batch):
            yield replace(case, sample=sample, built=1)
    if case.x != _zeros(case):
        yield replace(case, x=_zeros(case))
    if case.sample is not None and case.C is None and case.x == _zeros(case):
        one = replace(case, batch=1, sample=None, ball=_one_eps(case), labels=_one_label(case))
        yield replace(one, x=_zeros(one))
    if case.built != case.size:
        yield replace(case, built=case.size)
    if case.changed:
        yield replace(case, changed=False)
    if case.way != "module":
        yield replace(case, way="module")
    if case.options is not None:
        yield replace(case, options=None)
    for value in [0, *live[:-1]]:  # cut the end off
        if case.C is None or network.shape_of(value) == network.shape_of(network.output):
            yield replace(
                case, network=replace(network, output=value), labels=None if value != network.output else case.labels
            )
    if case.C is not None:
        yield replace(case, C=None, calls=tuple(replace(call, rows=False) for call in case.calls))
    for value in reversed(live):  # begin later, at the value that is there
        later = network.starting(value)
        if later is not None and later.live():
            point = network.values(case.model(), case.inputs().double())[value].detach()
            yield replace(case, network=later, x=_literal(point, 4), batch=len(point), sample=None, ball=_one_eps(case))
    for value in reversed(live):  # leave a step out
        for by in range(value):
            if network.shape_of(by) == network.shape_of(value):
                yield replace(case, network=network.skipping(value, by))
    yield from _simpler_calls(case)
    yield from _simpler_sets(case)
    for made, statement in network.made.items():
        for text in _plainer(statement):
            yield replace(case, network=replace(network, made={**network.made, made: text}))
    yield from _smaller_sizes(case)
    if case.dtype != "float64":
        yield replace(case, dtype="float64")
    if case.x != _zeros(case) and (case.sample is not None or "torch.tensor" in case.x):
        for digits in _DIGITS:
            text = _literal(case.inputs().double(), digits)
            if len(text) < len(case.x) or case.sample is not None:
                one = replace(case, ball=_one_eps(case), labels=_one_label(case))
                yield replace(one, x=text, batch=case.size, sample=None)


def _simpler_calls(case: Case) -> Iterator[Case]:
    for call in case.calls:
        for side in ("lower", "upper"):
            if getattr(call, side) and getattr(call, "upper" if side == "lower" else "lower"):
                yield replace(case, calls=(replace(call, **{side: False}),))
        if call.mode:
            yield replace(case, calls=(replace(call, mode=""),))
        for option in call.options:
            if not option.startswith(("labels", "seed", "steps", "loss_fusion")):
                yield replace(case, calls=(replace(call, options=tuple(o for o in call.options if o != option)),))


def _simpler_sets(case: Case) -> Iterator[Case]:
    ball = case.ball
    if isinstance(ball.eps, tuple):
        for eps in sorted(set(ball.eps)):
            yield replace(case, ball=replace(ball, eps=eps))
    if ball.engines:
        yield replace(case, ball=replace(ball, engines=False))
    if ball.low is not None and ball.eps is not None:
        yield replace(case, ball=replace(ball, low=None))
    if ball.high is not None and ball.eps is not None:
        yield replace(case, ball=replace(ball, high=None))
    for norm in (math.inf, 2.0):
        if ball.norm not in (norm, math.inf):
            yield replace(case, ball=replace(ball, norm=norm))
    for eps in (1.0, 0.1):
        if isinstance(ball.eps, float) and ball.eps not in (1.0, eps):
            yield replace(case, ball=replace(ball, eps=eps))
    if ball.eps is None:
        yield replace(case, ball=Ball())


def _plainer(statement: str) -> Iterator[str]:
    """The same weights as torch draws them, as ones, or as ordinary numbers."""
    yield re.sub(r"filled\((.*), \d+, [^,]+\)$", r"\1", statement)
    yield re.sub(r"numbers\((\([\d, ]*\)), \d+, [^,)]+\)", r"torch.ones(\1)", statement)
    yield re.sub(r"(filled\(.*|numbers\(.*), (?!1\.0)[^,)]+\)", r"\1, 1.0)", statement)


def _smaller_sizes(case: Case) -> Iterator[Case]:
    """One number of the network replaced by a smaller one wherever it stands: with luck again a network."""
    network = case.network
    texts = [case.x, *network.made.values(), *(network.lines[value - 1].code for value in network.live())]
    found = {int(number) for text in texts for number in _SIZE.findall(text)}
    for size in sorted((size for size in found if 1 < size < 100), reverse=True):
        for smaller in sorted({1, 2, size - 1} - {size}):

            def put(text: str, size: int = size, smaller: int = smaller) -> str:
                return _SIZE.sub(lambda match: str(smaller) if int(match[0]) == size else match[0], text)

            lines = tuple(replace(line, code=put(line.code)) for line in network.lines)
            made = {name: put(statement) for name, statement in network.made.items()}
            x = put(case.x) if "torch.tensor" not in case.x else put(_zeros(case))
            resized = _measured(replace(case, x=x, network=replace(network, lines=lines, made=made)))
            if resized is not None:
                yield resized


def _measured(case: Case) -> Case | None:
    """The case with the shapes that its texts give; None if they do not fit each other."""
    try:
        x = case.inputs().double()
        network = replace(case.network, shape=tuple(x.shape[1:]))
        values = network.values(replace(case, network=network).model(), x)
    except Exception:  # whatever torch says of shapes that do not fit
        return None
    lines = list(network.lines)
    for value in network.live():
        lines[value - 1] = replace(lines[value - 1], shape=tuple(values[value].shape[1:]))
    batch = len(x) if case.sample is None else case.batch
    return replace(case, network=replace(network, lines=tuple(lines)), batch=batch, built=min(case.built, len(x)))


def _one_eps(case: Case) -> Ball:
    eps = case.ball.eps
    if isinstance(eps, tuple) and case.sample is not None:
        return replace(case.ball, eps=eps[case.sample])
    return case.ball


def _one_label(case: Case) -> tuple[int, ...] | None:
    if case.labels is None or case.sample is None:
        return case.labels
    return case.labels[case.sample : case.sample + 1]


def _zeros(case: Case) -> str:
    return f"torch.zeros({(case.batch, *case.network.shape)})"


def _literal(x: torch.Tensor, digits: int) -> str:
    """Text of a tensor, each number with so many digits."""

    def text(values: object) -> str:
        if isinstance(values, list):
            return f"[{', '.join(map(text, values))}]"
        return repr(float(f"{values:.{digits}g}"))

    return f"torch.tensor({text(x.tolist())})"


def reproduction(case: Case, outcome: Outcome) -> str:
    """The program, which says what is wrong and exits with 1 while it is."""
    call = outcome.call
    said = outcome.message.strip().splitlines()[0].replace("\\", "/").replace('"', "'") if outcome.message else ""
    doc = f'"""{outcome.status}: {said}"""\n'
    if call is None:
        return doc + case.source(tail="print('the graph was built')\nsys.exit(1)\n")
    tail = call.source() + "\n"
    if outcome.status != "violated" or outcome.point is None:
        return doc + case.source(call, tail + "print(lower, upper)\nsys.exit(1)\n")
    side = "lower" if outcome.message.startswith("lower") else "upper"
    tail += f"point = torch.tensor({outcome.point.tolist()}, dtype=torch.float64)  # in the set\n"
    tail += "outputs = model.double()(point).flatten()\n"
    value = f"outputs[{outcome.entry}]"
    if call.rows:
        row = "0" if str(case.C).startswith("numbers((1,") or case.sample is not None else str(outcome.sample)
        value = f"(C[{row}, {outcome.entry}].double() * outputs).sum()"
    if call.fused:
        value = f"(outputs.logsumexp(0) - outputs[labels[{0 if case.sample is not None else outcome.sample}]])"
    sample = 0 if case.sample is not None else outcome.sample
    tail += f"value, bound = float({value}), float({side}.flatten(1)[{sample}, {outcome.entry}])\n"
    tail += f'print("{side} bound", bound, "value", value)\n'
    return doc + case.source(call, tail + f"sys.exit(value {'<' if side == 'lower' else '>'} bound)\n")
