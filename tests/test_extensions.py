"""What other packages add: the example package, installed beside, and the tables' refusals."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lirpa_ext import extensions
from lirpa_ext.attacks import ATTACKS, FGSM, register_attack
from lirpa_ext.cli import Task
from lirpa_ext.data import DATA, load_data, register_data
from lirpa_ext.domain.scalar_functions import ScalarFunction, check_function
from lirpa_ext.errors import ConfigError, DataError, OptionError, RegistrationError, UnknownMethodError
from lirpa_ext.importer.lowering import LOWERINGS, register_lowering
from lirpa_ext.methods import METHODS, register_method
from lirpa_ext.nodes import CUSTOM_OPS, register_activation, register_node
from lirpa_ext.rules import RULES, check_table, register_rule
from lirpa_ext.training import OBJECTIVES, Loss, register_loss

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "extension"

USE = """
import json, math, sys
import numpy as np, onnx, torch
from onnx import helper
import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, certify, load_onnx
from lirpa_ext.data import load_data
from lirpa_ext.methods import known_methods
from lirpa_ext.training import Loss, Step
from lirpa_ext.training.objectives import step_loss
from lirpa_ext.training.schedules import Values

assert "best-of-orders" in known_methods()
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

class Net(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = torch.nn.Linear(2, 8), torch.nn.Linear(8, 2), function
    def forward(self, x):
        return self.last(self.function(self.first(x)))

def sound(model, methods):
    x = torch.randn(3, 2)
    for norm, eps in ((2, 0.3), (math.inf, 0.2)):
        ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))
        for method in methods:
            graph = BoundedModule(model, x)
            lower, upper = graph.compute_bounds(ball, method=method)
            assert lower.isfinite().all() and upper.isfinite().all(), method
            assert not graph.last_result.fallbacks
            for _ in range(200):
                step = torch.randn_like(x)
                step = eps * (step.sign() if norm == math.inf else step / step.norm(dim=1, keepdim=True))
                points = model(x + torch.rand(3, 1) * step)
                assert (lower - 1e-9 <= points).all() and (points <= upper + 1e-9).all(), method

# a rule
index = torch.tensor([[1, 0, 1, 3, 3, 2, 7, 7]])
sound(Net(lambda v: torch.gather(v, 1, index.expand(len(v), -1))), ["bcp", "lipschitz", "bcp-crown"])
# an activation
from lirpa_ext_example.activation import snake
sound(Net(snake), ["bcp", "bcp-crown", "bcp-alpha-crown", "slope:crown", "IBP", "CROWN-IBP", "CROWN"])
# a method, with the options of the one it wraps
model, x = Net(torch.relu), torch.randn(3, 2)
sound(model, ["best-of-orders"])
ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.3))
names = ("bcp-crown", "slope:ibp", "best-of-orders")
found = [BoundedModule(model, x).compute_bounds(ball, method=name)[0] for name in names]
assert torch.equal(found[2], torch.maximum(found[0], found[1]))
BoundedModule(model, x).compute_bounds(ball, method="best-of-orders", tighten=False, also="slope:crown")
try:
    BoundedModule(model, x).compute_bounds(ball, method="best-of-orders", nonsense=1)
except lirpa_ext.errors.OptionError as error:
    assert "also, norms, tighten, outward" in str(error), error
else:
    raise AssertionError
# a lowering
ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 4]) for name in "xy"]
node = helper.make_node("Shrink", ["x"], ["y"], lambd=0.3, bias=0.3)
opsets = [helper.make_opsetid("", 13)]
file = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=opsets, ir_version=8)
network, points = load_onnx(file.SerializeToString()), torch.randn(5, 4, dtype=torch.float32)
torch.testing.assert_close(network(points), torch.nn.functional.softshrink(points, 0.3))
# a loss
loss = Loss("mtl-ibp", {"alpha": 0.3})
loss.check()
x, y = load_data("rings", "train")
x = x.double()
step = Step(BoundedModule(model, x), x, y, None, Values(0.1, 0.0, 1.0), 2, None, None)
value = step_loss(loss, step)
value.backward()
assert value.isfinite() and model.first.weight.grad.abs().sum() > 0
assert loss.objective.verifier(2) == "bcp-crown"
# an attack
report = certify(model, (x[:8], y[:8]), 0.1, attack="walk", method="best-of-orders", progress=False, radius=False)
assert report.meta["attack"]["name"] == "Walk"
torch.save(torch.nn.Linear(2, 2).state_dict(), sys.argv[1] + "/linear.pt")
print("fine")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a Python that has the example package."""
    place = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source") / "extension"
    copy.mkdir()
    for path in [EXAMPLE / "pyproject.toml", *(EXAMPLE / "lirpa_ext_example").glob("*.py")]:
        target = copy / path.relative_to(EXAMPLE)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(place), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(place), str(ROOT), before]))}


def run(arguments, environment, folder):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )


def test_an_installed_package_adds_one_of_each_kind(installed, tmp_path):
    done = run(["-c", USE, str(tmp_path)], installed, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


def test_the_command_line_has_what_a_package_adds(installed, tmp_path):
    (tmp_path / "arch.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(2, 2)\n")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    command = ["-m", "lirpa_ext.cli"]
    model = ["linear.pt", "--arch", "arch:net", "--data", "rings", "--data-range", "none"]
    done = run([*command, "certify", *model, "--eps", "0.1", "--method", "best-of-orders", "--attack", "walk",
                "--quiet", "--limit", "20", "--out", "out"], installed, tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["meta"]["attack"]["name"] == "Walk"
    done = run([*command, "analyze", "confidence", *model, "--out", "out"], installed, tmp_path)
    assert done.returncode == 0 and "confidence" in done.stdout, done.stderr
    assert (tmp_path / "out" / "confidence.png").exists()


def test_the_example_is_short():
    """Each extension is at most ten lines of code, not counting imports, docstrings and the registration."""
    for path in (EXAMPLE / "lirpa_ext_example").glob("[a-z]*.py"):
        text = path.read_text().split('"""')
        code = [line for part in text[::2] for line in part.splitlines() if line.strip()]
        code = [line for line in code if not line.startswith(("import", "from", "register", "#", "snake = "))]
        assert 3 <= len(code) <= 12, (path.name, len(code))


# --- refusals ---


@pytest.fixture
def tables():
    kept = [(table, dict(table)) for table in (RULES, CUSTOM_OPS, METHODS, LOWERINGS, OBJECTIVES, ATTACKS, DATA)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def test_a_name_is_not_overwritten_in_silence(tables):
    rule, node = RULES["BoundRelu"], CUSTOM_OPS["onnx::Relu"]
    for register, name, value in (
        (register_rule, "BoundRelu", rule), (register_method, "bcp", METHODS["bcp"]),
        (register_node, "onnx::Relu", node),
        (register_lowering, "Clip", LOWERINGS["Clip"]), (register_attack, "pgd", FGSM), (register_data, "digits", len),
        (register_loss, "bcp", len),
    ):  # fmt: skip
        with pytest.raises(RegistrationError, match=rf"{name}' exists already"):
            register(name, value)
        register(name, value, overwrite=True)
    with pytest.raises(RegistrationError, match="needs a name"):
        register_attack(" ", FGSM)
    with pytest.raises(UnknownMethodError):
        register_method("mine", METHODS["bcp"], wraps="nonsense")
    with pytest.raises(UnknownMethodError):
        register_loss("mine", len, verify="nonsense")
    with pytest.raises(RegistrationError, match=r"no class of lirpa_ext\.engine\.Bound"):
        register_node("my::Op", len)


def test_a_kind_that_is_mistyped_fails(tables):
    RULES["BoundLinaer"] = RULES["BoundLinear"]
    with pytest.raises(RegistrationError, match="no class of nodes: BoundLinaer"):
        check_table({"BoundLinear", *RULES} - {"BoundLinaer"})


class Cubic(ScalarFunction):
    turns, rising = (0.0,), (False, True)

    def value(self, x):
        return x**3

    def derivative(self, x):
        return 3 * x**2


def changed(**fields):
    return type("Changed", (Cubic,), fields)()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (changed(derivative=lambda self, x: 3 * x), "its derivative"),
        (changed(turns=(), rising=(True,)), "turns"),
        (changed(rising=(True, True)), "turns"),
        (
            changed(value=lambda self, x: -(x**3), derivative=lambda self, x: -3 * x**2, rising=(True, False)),
            "never falls",
        ),
        (changed(least=0.0), "its range"),
        (changed(most=10.0), "its range"),
    ],
    ids=["derivative", "turns", "rising", "monotone", "least", "most"],
)
def test_a_function_that_is_not_what_it_says(tables, function, words):
    check_function(Cubic())
    with pytest.raises(RegistrationError, match=words.replace("(", r"\(")):
        register_activation("Changed", function)
    assert "lirpa_ext::Changed" not in CUSTOM_OPS


def test_an_unknown_name_is_refused():
    with pytest.raises(OptionError, match="unknown attack 'nonsense'; known are apgd, pgd"):
        from lirpa_ext.attacks import make_attack

        make_attack("nonsense")
    with pytest.raises(ConfigError, match="unknown loss 'nonsense'"):
        Loss("nonsense").check()


def test_options_of_a_loss(tables):
    register_loss("mine", lambda step, alpha=0.5: step)
    Loss("mine", {"alpha": 1.0}).check()
    with pytest.raises(ConfigError, match="no option 'beta'; its options are alpha"):
        Loss("mine", {"beta": 1.0}).check()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("os:system", "no function of a `split`"), ("nowhere:f", "cannot be loaded"),
        ("os:nothing", "cannot be loaded"),
        ("own_data:fails", "fails: ValueError: on purpose"), ("own_data:pairs", "cannot be read as pairs"),
    ],
)  # fmt: skip
def test_data_of_a_function(tmp_path, monkeypatch, source, words):
    (tmp_path / "own_data.py").write_text(
        "import torch\ndef good(split):\n    return torch.ones(4, 2), torch.zeros(4, dtype=torch.long)\n"
        "def fails(split):\n    raise ValueError('on purpose')\ndef pairs(split):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    x, y = load_data("own_data:good", limit=3)
    assert x.shape == (3, 2) and y.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=words):
        load_data(source)


def test_a_broken_extension_is_told_and_left_out(monkeypatch, caplog):
    class Point:
        name, value = "broken", "broken_package"

        def load(self):
            raise ImportError("on purpose")

    monkeypatch.setattr(extensions, "_loaded", [])
    monkeypatch.setattr(extensions, "entry_points", lambda group: [Point()])
    extensions.load_extensions()
    assert "the extension broken (broken_package) cannot be loaded: ImportError: on purpose" in caplog.text


def test_a_runs_folder_names_no_code_to_be_run(tmp_path, monkeypatch):
    """A folder may be somebody else's; what it names is imported only where the user says so."""
    (tmp_path / "data_of_a_run.py").write_text("open('it_ran', 'w').close()\ndef data(split):\n    raise ValueError\n")
    (tmp_path / "config.yaml").write_text("data: {init_args: {source: 'data_of_a_run:data'}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    told = {"targets": [str(tmp_path)], "data": None, "split": "test", "limit": None}
    with pytest.raises(OptionError, match="which is code: pass --data or --trust"):
        _ = Task(argparse.Namespace(trust=False, **told)).data
    assert not (tmp_path / "it_ran").exists()
    with pytest.raises(DataError, match="fails: ValueError"):
        _ = Task(argparse.Namespace(trust=True, **told)).data
    assert (tmp_path / "it_ran").exists()
