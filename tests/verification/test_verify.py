"""`verify`: verdicts against what is known, witnesses, limits, and the command."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lirpa_ext import errors, load_onnx, load_vnnlib, verify
from lirpa_ext.cli import main
from lirpa_ext.engine.limits import Deadline, OutOfTime
from lirpa_ext.verification.falsify import Judge
from lirpa_ext.verification.goals import Bounder, Goal

_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "onnx"
needs_files = pytest.mark.skipif(not _FOLDER.is_dir(), reason=f"the networks are not there ({_FOLDER})")
BOUNDS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN")


def text(lower, upper, outputs: int, *assertions: str) -> str:
    """A property over a box."""
    lines = [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [f"(assert (<= {low} X_{i} {high}))" for i, (low, high) in enumerate(zip(lower, upper, strict=True))]
    return "\n".join([*lines, *(f"(assert {assertion})" for assertion in assertions)])


def network(*widths: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


# --- verdicts ------------------------------------------------------------------------------------------------


def test_known_margins():
    """y = relu(x) + 0.5 relu(-x) on [-1, 2] is in [0, 2]; IBP gives [0, 2.5], CROWN's upper line is no better."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [-1.0]])
        model[2].weight[:] = torch.tensor([[1.0, 0.5]])
    verdict = verify(model, load_vnnlib(text([-1], [2], 1, "(>= Y_0 3)")))
    assert (verdict.status, verdict.method) == ("verified", "IBP")
    assert verdict.margin == pytest.approx(0.5, abs=1e-9) and verdict.margin < 0.5
    verdict = verify(model, load_vnnlib(text([-1], [2], 1, "(>= Y_0 2.1)")))
    assert (verdict.status, verdict.method) == ("verified", "CROWN-IBP")
    verdict = verify(model, load_vnnlib(text([-1], [2], 1, "(>= Y_0 2)")))
    assert (verdict.status, verdict.method) == ("violated", "PGD")
    assert verdict.witness.input.tolist() == [2] and verdict.witness.output.tolist() == [2]


def test_a_conjunction_needs_one_row_and_a_disjunction_all():
    model = nn.Sequential(nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight[:], model[0].bias[:] = torch.tensor([[1.0], [-1.0]]), 0.0  # y = (x, -x)
    both = text([0], [1], 2, "(>= Y_0 0.75)", "(>= Y_1 -2)")
    verdict = verify(model, load_vnnlib(both), methods=BOUNDS, attack=0)
    assert verdict.status == "unknown" and verdict.margin == pytest.approx(-0.25)
    verdict = verify(model, load_vnnlib(both.replace("0.75", "1.25")))
    assert verdict.status == "verified" and verdict.margin == pytest.approx(0.25)
    either = "(or (>= Y_0 1.25) (and (>= Y_1 0.5) (>= Y_0 0)) (<= (+ Y_0 Y_1) -1))"
    verdict = verify(model, load_vnnlib(text([0], [1], 2, either)))
    assert verdict.status == "verified" and verdict.margin == pytest.approx(0.25)
    assert verify(model, load_vnnlib(text([0], [1], 2, either.replace("1.25", "1")))).status == "violated"
    # Neither row alone is out of reach, though both together are: x >= 0.75 and x <= 0.25.
    apart = load_vnnlib(text([0], [1], 2, "(>= Y_0 0.75)", "(>= Y_1 -0.25)"))
    assert verify(model, apart, methods=BOUNDS).status == "unknown"
    verdict = verify(model, apart)
    assert (verdict.status, verdict.method) == ("verified", "split")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 6))])
def test_verdicts_agree_with_a_grid(seed, dtype):
    """Random networks, thresholds around their range: what is verified has no unsafe point, what is violated has."""
    model = network(2, 8, 8, 3, seed=seed)
    axis = torch.linspace(-1, 1, 41)
    values = model(torch.cartesian_prod(axis, axis)).detach().double()
    statuses = []
    for offset in (-0.5, -0.02, 0.02, 0.5):
        highest = (values[:, 0] - values[:, 1]).max().item() + offset
        lowest = values[:, 2].min().item() - offset
        property = text([-1, -1], [1, 1], 3, f"(or (>= (- Y_0 Y_1) {highest}) (and (<= Y_2 {lowest}) (<= Y_2 1e3)))")
        verdict = verify(model, load_vnnlib(property), dtype=dtype)
        reached = bool(((values[:, 0] - values[:, 1] >= highest) | (values[:, 2] <= lowest)).any())
        statuses.append(verdict.status)
        assert (verdict.margin > 0) == (verdict.status == "verified")
        assert not (reached and verdict.status == "verified")
        if verdict.status == "violated":
            y = model(torch.from_numpy(verdict.witness.input).float()).detach().double()
            assert np.allclose(y, verdict.witness.output, atol=1e-6)
            assert y[0] - y[1] >= highest - 1e-6 or y[2] <= lowest + 1e-6
    assert statuses[0] == "violated" and statuses[-1] == "verified"
    assert "unknown" not in statuses


@pytest.mark.parametrize("method", BOUNDS)
def test_margins_are_below_those_of_sampled_points(method):
    model = network(3, 10, 10, 4)
    assertion = "(or (and (<= Y_0 Y_1) (<= Y_0 Y_2)) (and (>= (+ (* 2 Y_3) Y_1) 0.3)) (<= (- Y_3 Y_2) -0.2))"
    specification = load_vnnlib(text([-1, 0, 0.1], [-0.5, 0.3, 0.4], 4, assertion))
    verdict = verify(model, specification, methods=[method], attack=0)
    (case,) = specification.cases
    goal = Goal(case)
    points = case.lower + (case.upper - case.lower) * np.random.default_rng(0).uniform(size=(20_000, 3))
    values = model.double()(torch.from_numpy(points)).detach().numpy()
    found = goal.margins(values @ goal.rows.T).min()
    assert verdict.margin <= found
    assert verdict.margin > found - 3


def test_unions_of_boxes_and_vacuous_ones():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight[:], model.bias[:] = 1, 0
    head = "(declare-const X_0 Real) (declare-const Y_0 Real)"
    union = (
        "(assert (or (and (<= 0 X_0 1) (>= Y_0 1.5)) (and (<= 2 X_0 3) (<= Y_0 1.75)) (and (<= 5 X_0 4) (<= Y_0 9))))"
    )
    verdict = verify(model, load_vnnlib(head + union))
    assert [case.status for case in verdict.cases] == ["verified"] * 2
    assert [case.margin for case in verdict.cases] == pytest.approx([0.5, 0.25])
    assert verdict.margin == pytest.approx(0.25) and "empty box" in verdict.reasons[0]
    verdict = verify(model, load_vnnlib(head + union.replace("1.75", "2.75")))
    assert [case.status for case in verdict.cases] == ["verified", "violated"]
    assert verdict.status == "violated" and verdict.witness.case == 1
    verdict = verify(model, load_vnnlib(head + "(assert (<= 1 X_0 0)) (assert (<= Y_0 0))"))
    assert (verdict.status, verdict.margin, verdict.cases, verdict.method) == ("verified", np.inf, (), "")


def test_many_cases_are_bounded_together():
    model = network(2, 6, 1)
    boxes = [f"(and (<= {i} X_0 {i + 1}) (>= Y_0 {1000 + i}))" for i in range(150)]
    head = "(declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real) (assert (<= 0 X_1 1))"
    specification = load_vnnlib(f"{head} (assert (or {' '.join(boxes)}))")
    together = verify(model, specification)
    assert together.status == "verified" and len(together.cases) == 150
    model.batch_size = 1  # single samples only
    alone = verify(model, specification)
    assert [case.margin for case in alone.cases] == pytest.approx([case.margin for case in together.cases])


# --- exactness -----------------------------------------------------------------------------------------------


class Identity(nn.Module):
    def forward(self, x):
        return x * 1.0


def test_ties_are_no_certificate():
    """The unsafe set touches the box at one point, in decimal numbers that no float has."""
    for value in ("0.1", "0.3", "0.7", "1.1", "-0.9", "1e-3"):
        verdict = verify(Identity(), load_vnnlib(text([-2], [value], 1, f"(>= Y_0 {value})")), attack=0)
        assert verdict.status == "unknown", value
        above = float(value) + 1e-9 * abs(float(value))
        assert verify(Identity(), load_vnnlib(text([-2], [value], 1, f"(>= Y_0 {above!r})"))).status == "verified"


def test_a_witness_is_in_the_box_exactly():
    (case,) = load_vnnlib(text([0.1, 0.1, 1], [0.3, 0.1, 1], 3, "(>= Y_0 0.2)", "(>= Y_1 0)", "(>= Y_2 1)")).cases
    judge = Judge(lambda x: x, lambda x: x.astype(np.float32), (3,))
    found = judge.witness(0, case, np.array([0.9, 0.5, -3]))
    low, high = Fraction("0.1"), Fraction("0.3")
    assert low <= Fraction(found.input[0]) <= high and found.input[0] == np.float32(found.input[0])
    assert found.input[1] == 0.1 and found.input[2] == 1  # the float64 nearest to what is fixed
    assert judge.witness(0, case, np.array([0.15, 0.1, 1])) is None  # not unsafe
    assert Judge(lambda x: x - 1, judge.original, (3,)).witness(0, case, np.array([0.3, 0.1, 1])) is None
    assert Judge(judge.function, lambda x: x - 1, (3,)).witness(0, case, np.array([0.3, 0.1, 1])) is None
    assert Judge(judge.function, lambda x: x * np.nan, (3,)).witness(0, case, np.array([0.3, 0.1, 1])) is None


def test_a_witness_is_rechecked_by_the_reference():
    """A reference that differs from the module: what only one of them breaks is not violated."""
    model = Identity()
    specification = load_vnnlib(text([0], [1], 1, "(>= Y_0 0.5)"))
    assert verify(model, specification).status == "violated"
    model.reference = lambda x: x - 1
    assert verify(model, specification).status == "unknown"


def test_boxes_are_rounded_outward_in_float32():
    lower, upper = np.array([[0.1, -0.1]]), np.array([[0.7, 0.3]])
    bounder = Bounder(Identity(), (2,), torch.float32, True)
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    bound = bounder.lower("IBP", lower, upper, rows)[0]
    assert (bound <= [0.1, -0.1, -0.7, -0.3]).all() and (bound >= np.array([0.1, -0.1, -0.7, -0.3]) - 1e-4).all()
    with pytest.raises(errors.InvalidInputError, match="use float64"):
        bounder.lower("IBP", lower, upper, rows * 0.1)


class Nan(nn.Module):
    def forward(self, x):
        return (x - 5).sqrt()


def test_nan_verifies_nothing():
    verdict = verify(Nan(), load_vnnlib(text([0], [1], 1, "(>= Y_0 0.5)")))
    assert verdict.status == "unknown" and not verdict.margin > 0


# --- limits and errors ---------------------------------------------------------------------------------------


def test_the_timeout_is_kept():
    model = network(10, 200, 200, 200, 200, 5)
    specification = load_vnnlib(text([-1] * 10, [1] * 10, 5, "(>= Y_0 (+ Y_1 0.3))"))
    start = time.monotonic()
    verdict = verify(model, specification, timeout=2, attack=1)
    assert time.monotonic() - start < 6
    assert verdict.status != "unknown" or any("time" in reason for reason in verdict.reasons)
    for timeout in (0, -1, float("nan")):
        with pytest.raises(errors.InvalidInputError, match="timeout"):
            verify(model, specification, timeout=timeout)


def test_a_deadline_stops_torch_and_nothing_else():
    with Deadline(time.monotonic() + 60):
        assert torch.ones(3).sum() == 3
    with pytest.raises(OutOfTime), Deadline(time.monotonic() - 1):
        torch.ones(3).sum()
    assert torch.ones(3).sum() == 3


def test_a_deadline_lets_what_cleans_up_run():
    """torch.no_grad is left by a torch function; a deadline that stopped that one would leave gradients off."""
    with pytest.raises(OutOfTime), Deadline(time.monotonic() - 1), torch.no_grad():
        torch.zeros(1).exp()
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no limit of the address space here")
def test_memory_that_runs_out_leaves_a_method_for_the_next():
    # In a process of its own: one that has freed memory before may take that again without asking for more.
    code = """
import math, resource, torch
from lirpa_ext.engine.limits import memory_limit
from test_verify import load_vnnlib, network, text, verify
before = resource.getrlimit(resource.RLIMIT_AS)
try:
    with memory_limit(2**28):
        torch.zeros(2**28)
    raise AssertionError("1 GiB taken with 256 MiB left")
except RuntimeError as error:
    assert "allocate" in str(error), error
assert resource.getrlimit(resource.RLIMIT_AS) == before
model, specification = network(20, 3000, 3000, 2), load_vnnlib(text([-1] * 20, [1] * 20, 2, "(<= Y_0 -9)"))
verdict = verify(model, specification, methods=["CROWN", "IBP"], attack=0, max_memory=2**28)
assert verdict.reasons[0].startswith("CROWN gave up on case 0: out of memory"), verdict
assert verdict.margin > -math.inf, verdict
assert resource.getrlimit(resource.RLIMIT_AS) == before
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Peculiar(nn.Module):
    """An operation that the engine does not have."""

    def forward(self, x):
        return torch.cumsum(x, 1).sort(1).values


def test_what_the_engine_cannot_bound_is_attacked_still():
    specification = load_vnnlib(text([0, 0], [1, 1], 2, "(>= Y_1 1.5)"))
    verdict = verify(Peculiar(), specification)
    assert verdict.status == "violated" and verdict.reasons[0].startswith("IBP gave up on case 0: TraceError")
    verdict = verify(Peculiar(), load_vnnlib(text([0, 0], [1, 1], 2, "(>= Y_1 2.5)")), methods=("IBP", "CROWN"))
    assert verdict.status == "unknown" and verdict.margin == -np.inf and len(verdict.reasons) == 2
    assert verdict.to_dict()["margin"] is None


def test_arguments():
    model = network(2, 4, 3)
    specification = load_vnnlib(text([0, 0], [1, 1], 3, "(>= Y_1 1.5)"))
    with pytest.raises(errors.DataError, match=r"2 inputs X, the network takes 4 \(4,\)"):
        verify(model, specification, input_shape=(4,))
    with pytest.raises(errors.InvalidInputError, match="fails on an input of shape"):
        verify(model, specification, input_shape=(1, 2, 1))
    with pytest.raises(errors.DataError, match="3 outputs Y, the network gives 4"):
        verify(network(2, 4), specification)
    with pytest.raises(errors.UnknownMethodError, match="nonsense"):
        verify(model, specification, methods=["nonsense"])
    for options in ({"attack": -1}, {"dtype": torch.float16}):
        with pytest.raises(errors.InvalidInputError):
            verify(model, specification, **options)


def test_image_shapes_and_the_users_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()  # outputs (B, 2, 2, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(1, 1, 4, 4)
    y = model(x).flatten().tolist()
    low, high = (x - 0.001).flatten().tolist(), (x + 0.001).flatten().tolist()
    for sign, status in ((1, "verified"), (-1, "violated")):
        assertions = [f"(or {' '.join(f'(>= Y_{i} {value + sign * 0.01})' for i, value in enumerate(y))})"]
        verdict = verify(model, load_vnnlib(text(low, high, 8, *assertions)), input_shape=(1, 4, 4))
        assert verdict.status == status
    assert verdict.witness.input.shape == (1, 4, 4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


# --- benchmarks ----------------------------------------------------------------------------------------------


def instance(name: str):
    records = json.loads((_FOLDER / "manifest.json").read_text())["vnnlib"]
    record = next(record for record in records if record["name"] == name)
    return load_onnx(_FOLDER / record["onnx"]), load_vnnlib(_FOLDER / record["vnnlib"])


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("test_nano", "IBP"), ("cartpole_safe", "CROWN-IBP"), ("mnistfc_p0", "CROWN"), ("verivital_max", "IBP"),
        ("acas_p1", "split"), ("acas_p3", "split"),
    ],
)  # fmt: skip
def test_benchmarks_are_verified(name, method):
    model, specification = instance(name)
    verdict = verify(model, specification, timeout=60)
    assert (verdict.status, verdict.method, verdict.reasons) == ("verified", method, ())
    assert verdict.seconds < 60


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "margins"),
    [
        ("test_nano", [1.0]),
        ("cartpole_safe", [0.03021]),
        ("mnistfc_p0", [0.412, 0.489, 0.434, 0.475, 0.399, 0.341, 0.443, 0.470, 0.349]),
    ],
)
def test_crown_margins_of_benchmarks(name, margins):
    """Margins of each polytope; for mnistfc_p0 the manifest has the largest of them, which decides nothing."""
    model, specification = instance(name)
    (case,) = specification.cases
    goal = Goal(case)
    bounder = Bounder(model.double(), model.input_shape, torch.float64, model.batch_size is None)
    lower = bounder.lower("CROWN", case.lower[None], case.upper[None], goal.rows)[0]
    assert goal.margins(lower) == pytest.approx(margins, abs=6e-4)


@needs_files
@pytest.mark.parametrize("name", ["gcas0", "resnet2b", "verivital_max", "vit"])
def test_margins_of_the_manifest_that_no_bound_has(name):
    """Its figures for CROWN are above margins of points of the box: they are of some disjunct or row, not the least.

    gcas0, resnet2b and vit are said there to be verified by CROWN; with their least margins they are not.
    """
    record = next(r for r in json.loads((_FOLDER / "manifest.json").read_text())["vnnlib"] if r["name"] == name)
    model, specification = instance(name)
    (case,) = specification.cases
    corners = np.random.default_rng(0).choice([0.0, 0.5, 1.0], (20, specification.inputs))
    x = case.inner_lower + corners * (case.inner_upper - case.inner_lower)
    y = model.reference(x.reshape(-1, *model.input_shape).astype(np.float32)).astype(np.float64)
    margins = [(y @ unsafe.rows.T - np.array(unsafe.limits, float)).max(1) for unsafe in case.unsafe]
    assert np.min(margins) < record["measured"]["CROWN"][0]


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole_safe", "mnistfc_p0"])
def test_benchmarks_made_wrong_are_violated(name):
    model, _ = instance(name)
    record = {"cartpole_safe": "(<= Y_0 Y_1)", "mnistfc_p0": "(>= Y_0 Y_4)"}[name]
    source = (_FOLDER / "vnnlib" / f"{name}.vnnlib").read_text()
    opposite = record.replace("<=", "?").replace(">=", "<=").replace("?", ">=")
    wrong = load_vnnlib(source.replace(record, opposite))
    verdict = verify(model, wrong)
    assert verdict.status == "violated"
    (case,) = wrong.cases
    x = verdict.witness.input.reshape(-1)
    assert (case.inner_lower <= x).all() and (x <= case.inner_upper).all()
    output = model.reference(verdict.witness.input[None].astype(np.float32))[0]
    assert any(unsafe.contains(output) for unsafe in case.unsafe)
    assert np.array_equal(output, verdict.witness.output)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    torch.onnx.export(
        network(2, 6, 2), torch.zeros(1, 2), tmp_path / "net.onnx", dynamo=False, opset_version=17,
        dynamic_axes={"input": {0: "batch"}}, input_names=["input"],
    )  # fmt: skip
    for name, limit in (("safe", "100"), ("unsafe", "-100")):
        (tmp_path / f"{name}.vnnlib").write_text(text([-1, -1], [1, 1], 2, f"(>= Y_0 {limit})"))
    return tmp_path


def test_command(files, capsys):
    net, report = str(files / "net.onnx"), files / "out.json"
    assert main(["verify", net, str(files / "safe.vnnlib"), "--timeout", "60", "--json", str(report)]) == 0
    assert capsys.readouterr().out.startswith("verified: margin ")
    found = json.loads(report.read_text())
    assert found["status"] == "verified" and found["margin"] > 0 and found["method"] == "IBP"
    assert main(["verify", net, str(files / "unsafe.vnnlib"), "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("violated: ") and "X = " in printed and "Y = " in printed
    witness = json.loads(report.read_text())["witness"]
    y = network(2, 6, 2)(torch.tensor(witness["input"])).tolist()
    assert y == pytest.approx(witness["output"], abs=1e-5) and y[0] >= -100
    arguments = ["verify", net, str(files / "unsafe.vnnlib"), "--attack-steps", "0", "--method", "IBP"]
    assert main(arguments) == 3
    assert capsys.readouterr().out.startswith("unknown: ")


def test_errors_of_the_command(files, capsys):
    net, safe = str(files / "net.onnx"), str(files / "safe.vnnlib")
    (files / "other.vnnlib").write_text(text([0], [1], 2, "(>= Y_0 0)"))
    (files / "cut.vnnlib").write_text((files / "safe.vnnlib").read_text()[:-3])
    for arguments, cause in (
        ((net, str(files / "other.vnnlib")), "1 inputs X"),
        ((net, str(files / "cut.vnnlib")), "truncated"),
        ((net, str(files / "nothing.vnnlib")), "cannot be read"),
        ((str(files / "nothing.onnx"), safe), "no file"),
        ((net, safe, "--method", "nonsense"), "unknown method"),
        ((net, safe, "--timeout", "0"), "timeout"),
        ((net, safe, "--json", str(files / "no" / "such.json")), "cannot be written"),
    ):
        assert main(["verify", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("lirpa-ext: error: ") and cause in captured.err
