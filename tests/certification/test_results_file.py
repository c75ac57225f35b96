"""The results file: which model it is of, who may write to it, and what of a damaged one is believed."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from lirpa_ext import certify, errors
from lirpa_ext.certification.report import Report

X, Y = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Scale(torch.autograd.Function):
    """What happens inside is not in the graph."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        return x * Scale.factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Scale.factor


class Net(nn.Module):
    """One function, whatever its parts are called."""

    def __init__(self, function=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("unsaved", torch.ones(4), persistent=False)
        self.constant = torch.ones(3)
        self.sign, self.function, self.opaque = 1.0, torch.relu, False
        self.branch = 1e9

    def forward(self, x):
        if float(x.detach().sum()) > self.branch:
            return -self.linear(x)
        x = Scale.apply(x) if self.opaque else x
        return self.function(self.linear(x / self.unsaved) * self.sign + self.constant)


def run(model, path, **options):
    options = {"eps": [0.01], "attack": None, "radius": False, "progress": False, "method": "IBP"} | options
    return certify(model, (X, Y), results=path, **options)


def _hooked(model):
    model.linear.register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = {
    "weight": lambda model: model.linear.weight.data[0, 0].mul_(1.001),
    "buffer that is not saved": lambda model: model.unsaved.mul_(100),
    "tensor attribute": lambda model: model.constant.mul_(2),
    "number attribute": lambda model: setattr(model, "sign", -1.0),
    "function attribute": lambda model: setattr(model, "function", torch.tanh),
    "hook": _hooked,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_knows_its_model_by_all_that_decides_outputs(tmp_path, change):
    run(Net(), tmp_path / "r.jsonl")
    assert len(run(Net(), tmp_path / "r.jsonl").records) == 12  # the same model, made anew
    model = Net()
    change(model)
    with pytest.raises(errors.ResultsError, match="results of another run: model_hash is"):
        run(model, tmp_path / "r.jsonl")


def test_outputs_tell_what_no_graph_shows(tmp_path, monkeypatch):
    def made(branch):
        model = Net()
        model.branch = branch
        return model

    run(made(1e9), tmp_path / "r.jsonl")
    largest = float(X.sum(1).max())
    with pytest.raises(errors.ResultsError, match="gives other outputs"):
        run(made((largest + float(X[0].sum())) / 2), tmp_path / "r.jsonl")


def test_a_hash_does_not_depend_on_the_process(tmp_path):
    program = (
        "import torch, lirpa_ext; from torch import nn; torch.manual_seed(0); "
        "m = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)); "
        "print(lirpa_ext.certify(m, (torch.ones(1, 4), torch.zeros(1, dtype=torch.long)), 0.1, attack=None, "
        "radius=False, progress=False).meta['model_hash'])"
    )
    found = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(found) == 1 and len(found.pop().strip()) == 64


def test_two_runs_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    program = (
        "import sys, lirpa_ext.certification.results_file as f; file = f.ResultsFile(sys.argv[1], {}); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(errors.ResultsError, match="in use by another run"):
            run(Net(), path)
        other.kill()  # a lock ends with its process, however that ends
    assert len(run(Net(), path).records) == 12
    assert len(run(Net(), path).records) == 12  # and with the run
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


WRONG = [
    ("radius", "far"), ("radius", True), ("clean_margin", [1.0]), ("prediction", "7"), ("prediction", 1.5),
    ("index", None), ("index", True), ("index", 10**400), ("label", {}), ("message", 3), ("levels", {"eps": 0.01}),
    ("levels", [[0.01]]), ("levels", None),
]  # fmt: skip
WRONG_LEVEL = [("eps", "0.01"), ("status", 1), ("status", ["certified"]), ("status", "good"), ("attack_margin", "-"),
               ("verified_margin", False), ("message", None)]  # fmt: skip
WRONG_META = [("samples", "12"), ("samples", None), ("eps", 0.01), ("eps", [None]), ("eps", []), ("attack", 5),
              ("norm", "large"), ("method", None), ("radius", "yes"), ("options", []), ("model_hash", 3)]  # fmt: skip


@pytest.mark.parametrize("kind", ["results file", "report"])
def test_fields_of_another_kind_are_refused(tmp_path, kind):
    """Neither a run that resumes nor a report that is read believes them."""
    path = tmp_path / "r.jsonl"
    report = run(Net(), path)
    meta, *lines = [json.loads(line) for line in path.read_text().splitlines()]

    def write(meta, lines):
        if kind == "report":
            path.write_text(json.dumps({"meta": meta, "summary": [], "records": lines}, indent=1))
        else:
            path.write_text("".join(json.dumps(line) + "\n" for line in [meta, *lines]))

    write(meta, lines)
    assert Report.load(path).records == report.records
    damaged = [(meta, [*lines[:3], lines[3] | {name: value}]) for name, value in WRONG]
    damaged += [(meta, [lines[0] | {"levels": [lines[0]["levels"][0] | {name: value}]}]) for name, value in WRONG_LEVEL]
    damaged += [(meta | {name: value}, lines) for name, value in WRONG_META]
    damaged += [(meta, [{k: v for k, v in lines[0].items() if k != name}]) for name in lines[0]]
    damaged += [({k: v for k, v in meta.items() if k != name}, lines) for name in ("samples", "eps", "norm", "attack")]
    for some_meta, some_lines in damaged:
        write(some_meta, some_lines)
        with pytest.raises(errors.ResultsError):
            Report.load(path)
        if kind == "results file":
            with pytest.raises(errors.ResultsError):
                run(Net(), path)


@pytest.mark.parametrize(
    "line", [b'{"index": NaN}', b"[" * 100_000, b'{"index": ' + b"9" * 10_000 + b"}", b"\xff\xfe", b'{"index": 1}' * 2]
)
def test_lines_that_are_no_json_are_refused(tmp_path, line):
    path = tmp_path / "r.jsonl"
    run(Net(), path)
    header = path.read_bytes().splitlines()[0]
    path.write_bytes(header + b"\n" + line + b"\n")
    with pytest.raises(errors.ResultsError, match="line 2"):
        run(Net(), path)
    path.write_bytes(b"{\n" + line)
    with pytest.raises(errors.ResultsError, match="corrupt one"):
        Report.load(path)
