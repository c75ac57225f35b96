"""The fuzzer: it finds planted defects, makes them small, prints programs that reproduce them, and repeats itself."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.attack import Attack, rounding
from fuzz.case import Ball, Call, Case, Region, execute
from fuzz.check import check
from fuzz.drawing import draw_case
from fuzz.growing import OPERATIONS
from fuzz.program import Line, Network
from fuzz.session import run
from fuzz.shrink import reproduction, shrink
from fuzz.summary import Finding

from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.methods import METHODS
from lirpa_ext.rules import RULES

PLAIN = {"linear", "square_linear", "activation", "join", "arithmetic"}
SCRIPT = Path(__file__).with_name("run_fuzz.py")


def session(method: str, status: str, graphs: int = 6) -> list[Finding]:
    """Failures of that status; others, of defects that are not planted, are another test's."""
    summary = run(300, 100, [method], PLAIN.__contains__, graphs, io.StringIO(), shrinking=8)
    return [finding for finding in summary.findings.values() if finding.status == status]


def exit_status(program: str) -> Any:
    """How a printed program ends: its exit status, or the error that it raises."""
    try:
        execute(program)
    except SystemExit as end:
        return int(end.code or 0)
    except RuntimeError as error:
        return error
    return 0


def linear_case(weight: str = "torch.tensor([[1.0, -2.0]])", **changes: Any) -> Case:
    """x @ W' for x = 0 and an l2 ball of radius 1."""
    line = Line("linear", "F.linear({0}, self.m0)", (0,), (1,), linear=True)
    network = Network((2,), (line,), 1, {"m0": f"self.m0 = nn.Parameter({weight})"})
    case = Case(network, "torch.zeros((1, 2))", 1, 1, Ball(2.0, 1.0), calls=(Call("bcp"),))
    return replace(case, **changes)


@pytest.mark.parametrize("first", [0, 10**6])
def test_a_seed_gives_the_same_programs(first):
    drawn = [[(case.source(), [call.source() for call in case.calls]) for case in map(draw_case, seeds)]
             for seeds in (range(first, first + 15), range(first, first + 15))]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert len({source for source, _ in drawn[0]}) == 15


def test_every_operation_is_drawn():
    drawn = set()
    for name in OPERATIONS:
        for seed in range(400):
            case = draw_case(seed, (), {"linear", name}.__contains__)
            if any(line.kind != "linear" for line in case.network.lines) or "linear" in name:
                drawn.add(name)
                break
    assert drawn | {"flat_head"} == set(OPERATIONS)


def test_bounds_slightly_inside_are_found_and_reproduced(monkeypatch):
    right = METHODS["bcp"]

    def inside(problem: Any, **options: Any) -> Any:
        lower, upper = right(problem, **options)
        if lower is None or upper is None:
            return lower, upper
        return lower + 0.01 * (upper - lower), upper

    with monkeypatch.context() as planted:
        planted.setitem(METHODS, "bcp", inside)
        found = session("bcp", "violated")
        assert found
        programs = [finding.program for finding in found]
        assert [exit_status(program) for program in programs] == [1] * len(programs)
    assert [exit_status(program) for program in programs] == [0] * len(programs), "the programs fail without the defect"
    assert min(len(finding.kinds) for finding in found) == 0, "the identity shows it"
    smallest = min(programs, key=len)
    assert smallest.count("\n") <= 45 and "import fuzz" not in smallest


def test_a_rule_with_half_the_radius_is_found(monkeypatch):
    rule = type(RULES["BoundBallBoxLinear"])
    right = rule.propagate

    def half(self: Any, *arguments: Any) -> Any:
        state = right(self, *arguments)
        return replace(state, radius=state.radius / 2) if isinstance(state, BallBox) else state

    monkeypatch.setattr(rule, "propagate", half)
    found = session("lipschitz", "violated", 5)
    assert found
    assert min(len(finding.kinds) for finding in found) == 1
    assert all(exit_status(finding.program) == 1 for finding in found)


def test_a_raw_error_is_found_and_reproduced(monkeypatch):
    def broken(problem: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setitem(METHODS, "lipschitz", broken)
    (found,) = session("lipschitz", "raw", 3)
    assert found.kinds == () and "planted" in str(exit_status(found.program))


@pytest.mark.parametrize("wrong", ["shape", "missing", "crossed"])
def test_bounds_of_another_shape_and_crossed_bounds_are_found(monkeypatch, wrong):
    right = METHODS["bcp"]

    def broken(problem: Any) -> Any:
        lower, upper = right(problem)
        return {"shape": (lower.flatten(), upper.flatten()), "missing": (lower, None), "crossed": (upper, lower)}[wrong]

    monkeypatch.setitem(METHODS, "bcp", broken)
    (outcome,) = check(linear_case())
    assert outcome.status != "held"
    assert outcome.status == "violated" or wrong == "crossed"


def test_held_bounds_are_held():
    (outcome,) = check(linear_case())
    assert (outcome.status, outcome.excused) == ("held", 0)


def test_networks_whose_samples_read_each_other_are_to_be_refused():
    network = Network((2,), (Line("flip", "{0}.flip(0)", (0,), (2,), mixes=True),), 1, {})
    (outcome,) = check(Case(network, "torch.ones((2, 2))", 2, 2, Ball(2.0, 1.0), calls=(Call("bcp"),)))
    assert outcome.status == "refused" and "each other" in outcome.message


@pytest.mark.parametrize(("norm", "most"), [(2.0, math.sqrt(5)), (math.inf, 3.0), (1.0, 2.0), (3.0, 3.8295)])
def test_the_attack_reaches_the_extremes_of_a_linear_network(norm, most):
    case = linear_case()
    x = torch.zeros(1, 2, dtype=torch.float64)
    region = Region(norm, torch.tensor(1.0, dtype=torch.float64), None, None)
    found = Attack(case.model(), x, region, torch.ones(1, 1, 1, dtype=torch.float64), False).search()
    largest = (1 + 2 ** (norm / (norm - 1))) ** (1 - 1 / norm) if 1 < norm < math.inf else most
    assert largest * (1 - 1e-3) < found.largest.item() <= largest * (1 + 1e-9)
    assert largest * (1 - 1e-3) < -found.smallest.item() <= largest * (1 + 1e-9)
    assert torch.linalg.vector_norm(found.at_largest.flatten(), ord=norm) <= 1 + 1e-9


def test_rounding_excuses_what_cancels_and_nothing_beside_it():
    """(x + 1e6) - 1e6 may be off by 1e6 times the precision; the output beside it may not."""
    lines = (
        Line("+", "{0} + self.m0", (0,), (2,)),
        Line("-", "{0} - self.m0", (1,), (2,)),
    )
    made = {"m0": 'self.register_buffer("m0", torch.tensor([[1e6, 0.0]]))'}
    network = Network((2,), lines, 2, made)
    model = linear_case(network=network).model()
    point = torch.full((1, 2), 0.5, dtype=torch.float64)
    big, small = (
        rounding(network, model, row, point, torch.float64, 1e-9) for row in torch.eye(2, dtype=torch.float64)
    )
    assert 1e-4 < big < 1e-2 and small < 1e-8


def test_shrinking_keeps_the_failure(monkeypatch):
    monkeypatch.setitem(METHODS, "bcp", lambda problem: (torch.ones(1, 1), torch.ones(1, 1)))
    case = linear_case("numbers((1, 2), 3, 30.0)", dtype="float32")
    (outcome,) = check(case)
    small, again = shrink(case, outcome, 5)
    assert again.status == outcome.status != "held"
    assert "numbers" not in reproduction(small, again)


def test_no_bound_is_violated_in_a_short_session(tmp_path):
    """A fixed seed, through the command that `make fuzz` runs."""
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT), "--seed", "7", "--graphs", "6", "--seconds", "300", "--json", str(numbers)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("seed 7\n")
    table = json.loads(numbers.read_text(encoding="utf-8"))
    assert table["graphs"] == 6 and table["attacked"] > 20
    assert (table["violated"], table["caught"], table["raw"], table["findings"]) == (0, 0, 0, [])
