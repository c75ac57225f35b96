"""`certify`: outcomes against closed forms, order of the accuracies, resumption, and every bad input."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lirpa_ext import errors
from lirpa_ext.attacks import APGD
from lirpa_ext.certification import certifier as certifier_module
from lirpa_ext.certification.certify import certify
from lirpa_ext.certification.report import Report
from lirpa_ext.certification.results_file import STATUSES
from lirpa_ext.data import load_data, load_digits
from lirpa_ext.methods import METHODS, register_method

EPS = [0.05, 0.15, 0.4]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture(scope="module")
def trained():
    x, y = load_digits("train")
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits("test")
    return x[:24], y[:24]


def run(model, data, eps=EPS, **options):
    defaults = {"x_L": 0.0, "x_U": 1.0, "batch_size": 10, "attack": APGD(5, 2), "progress": False, "radius": False}
    return certify(model, data, eps, **(defaults | options))


def statuses(report, position=0):
    return [record["levels"][position]["status"] for record in report.records]


@pytest.fixture
def method():
    """Register a method for one test: `method(function)` gives its name."""
    names = []

    def add(function):
        name = f"test-{len(names)}"
        register_method(name, function)
        names.append(name)
        return name

    yield add
    for name in names:
        del METHODS[name]


def margins_of(problem, change):
    """A method's answer: that of bcp, changed by `change(lower, inputs)`."""
    lower, upper = METHODS["bcp"](problem)
    return change(lower.clone(), problem.module._inputs[0].flatten(1)), upper


# --- outcomes ---


@pytest.mark.parametrize("name", ["bcp", "lipschitz", "CROWN", "IBP"])
def test_accuracies_are_ordered_and_monotone(trained, digits, name):
    report = run(trained, digits, method=name)
    rows = report.summary()
    for row in rows:
        assert row["verified"] <= row["pgd"] <= row["clean"] <= 1
        assert sum(row[status] for status in STATUSES) == 24
        assert row["error"] == 0
    for key in ("verified", "pgd"):
        assert all(before[key] >= after[key] for before, after in itertools.pairwise(rows))
    if name == "bcp":
        assert rows[0]["verified"] > rows[-1]["verified"]


def test_misclassified_counts_as_attacked(trained, digits):
    x, y = digits
    report = run(trained, (x, (y + 1) % 10), radius=True)
    wrong = [record for record in report.records if record["prediction"] != record["label"]]
    assert len(wrong) > 20
    assert all(record["radius"] == 0 and record["levels"][0]["status"] == "attacked" for record in wrong)


@pytest.mark.parametrize(("norm", "dual"), [(2, 2), (math.inf, 1)])
def test_radius_of_a_linear_model_is_the_closed_form(digits, norm, dual):
    """Without a data range it is min over j of (z_y - z_j) / ||w_y - w_j||_dual."""
    x, y = digits
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    logits, weight = model(x.double()).detach(), model[1].weight.detach()
    y = logits.argmax(1)
    rows = torch.linalg.vector_norm(weight[y].unsqueeze(1) - weight, ord=dual, dim=2)
    expected = ((logits.gather(1, y[:, None]) - logits) / rows).nan_to_num(math.inf).amin(1)
    report = run(model, (x, y), norm=norm, x_L=None, x_U=None, radius=1e-6, attack=APGD(20, 2))
    found = torch.tensor([record["radius"] for record in report.records], dtype=torch.float64)
    assert (found <= expected * (1 + 1e-12)).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for position, level in enumerate(EPS):
        assert [status == "certified" for status in statuses(report, position)] == (expected > level).tolist()


def test_radius_grows_beyond_the_largest_eps_and_agrees_with_the_levels(trained, digits):
    report = run(trained, digits, eps=[0.02, 0.1], radius=True)
    assert max(record["radius"] for record in report.records) > 0.1
    for record in report.records:
        for level in record["levels"]:
            assert (level["status"] == "certified") == (record["radius"] >= level["eps"])
    curve = report.curve()
    assert [eps for eps, _ in curve] == sorted({eps for eps, _ in curve})
    assert all(before[1] >= after[1] for before, after in itertools.pairwise(curve))
    assert curve[-1][1] > 0


def test_radius_of_a_constant_classifier_ends(digits):
    model = network()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.arange(10.0))
    report = run(model, (digits[0][:2], torch.tensor([9, 9])), radius=True, x_L=None, x_U=None)
    assert all(math.isfinite(record["radius"]) and record["radius"] > 1e3 for record in report.records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radius_search_ends_where_floats_do(trained, digits, dtype):
    data = digits[0][:3], digits[1][:3]
    report = run(trained, data, radius=1e-30, dtype=dtype)
    assert all(record["radius"] > 0 for record in report.records)


def test_a_tie_is_not_certified(digits, method):
    name = method(lambda problem: margins_of(problem, lambda lower, _: lower.clamp(max=0.0)))
    torch.manual_seed(0)
    model = network()
    data = (digits[0], model(digits[0]).argmax(1))
    assert "certified" not in statuses(run(model, data, eps=0.0, method=name))
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.zero_()
    report = run(model, (digits[0], torch.zeros(24, dtype=torch.long)), eps=0.0)
    assert set(statuses(report)) == {"attacked"}  # a clean tie is no correct prediction
    assert report.summary()[0]["clean"] == 0


def test_nan_and_exceptions_are_errors_of_their_sample(trained, digits, method):
    marked = digits[0][13].flatten().double()

    def nan(lower, inputs):
        lower[(inputs == marked).all(1), 0] = math.nan
        return lower

    def explode(lower, inputs):
        if (inputs == marked).all(1).any():
            raise ValueError("boom")
        return lower

    plain = run(trained, digits, eps=[0.0, 0.05], radius=True)
    for change, text in ((nan, "NaN"), (explode, "boom")):
        name = method(lambda problem, change=change: margins_of(problem, change))
        report = run(trained, digits, eps=[0.0, 0.05], method=name, radius=True)
        hit = report.records.pop(13)
        assert [level["status"] for level in hit["levels"]] == ["error", "error"]
        assert all(text in level["message"] for level in hit["levels"])
        assert hit["levels"][0]["verified_margin"] is None
        assert hit["radius"] is None
        others = plain.records[:13] + plain.records[14:]
        assert [record["levels"][1]["status"] for record in report.records] == [
            record["levels"][1]["status"] for record in others
        ]
        assert report.summary()[0]["error"] == 0


def test_an_error_counts_as_neither_outcome(trained, digits, method):
    def broken(problem):
        raise RuntimeError("always")

    report = run(trained, digits, method=method(broken))
    for row in report.summary():
        assert (row["verified"], row["pgd"], row["error"]) == (0, 0, 24)
        assert row["clean"] > 0


def test_an_unsound_method_is_found_out(trained, digits, method):
    name = method(lambda problem: margins_of(problem, lambda lower, _: lower + 100))
    report = run(trained, digits, method=name)
    assert set(statuses(report)) == {"error"}
    assert "unsound" in report.records[0]["levels"][0]["message"]


def test_a_model_that_gives_nan_is_an_error(digits):
    class Nan(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1))

    model = Nan()
    with torch.no_grad():
        model.linear.weight[0, 0] = math.nan
    report = run(model, digits, radius=True)
    assert set(statuses(report)) == {"error"}
    assert report.summary()[0]["clean"] == 0
    assert all(record["radius"] is None and record["clean_margin"] is None for record in report.records)


def test_an_overflow_is_an_error_of_its_sample(trained, digits):
    x, y = digits[0].double(), digits[1]
    x[3] = 1e308
    report = run(trained, (x, y), radius=True, x_L=None, x_U=None)
    assert statuses(report).count("error") == 1
    assert report.records[3]["levels"][0]["status"] == "error"
    assert "NaN or infinite" in report.records[3]["levels"][0]["message"]
    assert report.records[2]["radius"] > 0


def test_fatal_errors_come_at_once_but_not_late(trained, digits, method):
    """UnsupportedNodeError on the first batch stops the run; after a batch that worked it is that batch's."""
    calls = []

    def late(problem):
        calls.append(1)
        if len(calls) > 3:
            raise errors.UnsupportedNodeError("node 7")
        return METHODS["bcp"](problem)

    report = run(trained, digits, method=method(late))
    assert statuses(report).count("error") == 14

    def never(problem):
        raise errors.UnsupportedNodeError("node 7")

    with pytest.raises(errors.UnsupportedNodeError):
        run(trained, digits, method=method(never))


def test_the_model_is_left_alone(digits):
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    report = run(model, digits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert next(model.parameters()).requires_grad
    assert run(model, digits).records == report.records  # dropout is the identity


@pytest.mark.parametrize("kind", ["dataset", "loader", "arrays"])
def test_every_kind_of_data_gives_the_same(trained, digits, kind):
    data = {
        "dataset": TensorDataset(*digits),
        "loader": DataLoader(TensorDataset(*digits), batch_size=7),
        "arrays": tuple(part.numpy() for part in digits),
    }[kind]
    assert run(trained, data).records == run(trained, digits).records


def test_norm_1_float32_scalar_eps_and_no_attack(trained, digits):
    report = run(trained, digits, eps=0.05, norm=1, attack=None, dtype=torch.float32)
    assert report.summary()[0]["pgd"] is None
    assert report.meta["dtype"] == "float32"
    assert set(statuses(report)) <= {"certified", "unknown", "attacked"}
    assert " - " in report.table()


# --- files ---


def test_report_files_say_everything(trained, digits, tmp_path):
    report = run(trained, digits, radius=True, options={"tighten": False})
    report.to_json(tmp_path / "r.json")
    report.to_csv(tmp_path / "r.csv")
    report.plot(tmp_path / "r.png")
    content = json.loads((tmp_path / "r.json").read_text())
    for name in (
        "method", "options", "dtype", "eps", "norm", "x_L", "x_U", "package_version", "engine_version",
        "torch_version", "model_hash", "data_hash", "seed", "attack", "date",
    ):  # fmt: skip
        assert content["meta"][name] is not None
        assert f"# {name}: " in (tmp_path / "r.csv").read_text()
    assert content["meta"]["options"] == {"tighten": False}
    assert content["summary"] == report.summary()
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(rows) == 24 * len(EPS)
    assert float(rows[0]["verified_margin"]) == report.records[0]["levels"][0]["verified_margin"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert report.meta["model_hash"].encode() in (tmp_path / "r.png").read_bytes()
    assert Report.load(tmp_path / "r.json") == report


def test_a_run_that_crashed_resumes_to_the_same_file(trained, digits, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "new" / "cut.jsonl"
    expected = run(trained, digits, results=whole, radius=True)
    original = certifier_module.Certifier.certify

    def crash(self, batch, *rest):
        if batch.start == 20:
            raise KeyboardInterrupt
        return original(self, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(certifier_module.Certifier, "certify", crash)
        with pytest.raises(KeyboardInterrupt):
            run(trained, digits, results=cut, radius=True)
    lines = cut.read_bytes().splitlines(keepends=True)
    assert len(lines) == 21
    cut.write_bytes(b"".join(lines[:16]) + lines[16][:40])  # as after a power cut: 15 samples and a torn line
    assert len(Report.load(cut).records) == 15
    report = run(trained, digits, results=cut, radius=True)
    assert report.records == expected.records
    assert cut.read_bytes().splitlines()[1:] == whole.read_bytes().splitlines()[1:]

    def forbidden(*_):
        raise AssertionError("everything is on file")

    monkeypatch.setattr(certifier_module.Certifier, "certify", forbidden)
    assert run(trained, digits, results=cut, radius=True).records == expected.records


def test_a_torn_header_starts_anew(trained, digits, tmp_path):
    path = tmp_path / "r.jsonl"
    run(trained, digits, results=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    run(trained, digits, results=path)
    assert path.read_bytes().splitlines()[1:] == whole.splitlines()[1:]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model_hash", {"model": network(5)}),
        ("data_hash", {"data": slice(1, 24)}),
        ("method", {"method": "lipschitz"}),
        ("eps", {"eps": [0.1]}),
        ("norm", {"norm": math.inf}),
        ("x_U", {"x_U": 2.0}),
        ("dtype", {"dtype": torch.float32}),
        ("options", {"options": {"tighten": False}}),
    ],
)
def test_a_results_file_of_another_run_is_refused_and_kept(trained, digits, tmp_path, field, change):
    path = tmp_path / "r.jsonl"
    run(trained, digits, results=path)
    before = path.read_bytes()
    part = change.pop("data", slice(None))
    arguments = {"model": trained, "data": (digits[0][part], digits[1][part])} | change
    with pytest.raises(errors.ResultsError, match=f"{field} is"):
        run(results=path, **arguments)
    assert path.read_bytes() == before
    run(results=path, resume=False, **arguments)
    assert (tmp_path / "r.jsonl.1").read_bytes() == before


def test_corrupt_results_files(trained, digits, tmp_path):
    path = tmp_path / "r.jsonl"
    run(trained, digits, results=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (b"{nonsense\n", lines[2], b'{"index": 99, "levels": []}\n', b"[]\n"):
        path.write_bytes(b"".join([*lines[:3], bad, *lines[4:]]))
        with pytest.raises(errors.ResultsError, match=r"line 4 .* is corrupt"):
            run(trained, digits, results=path)
    for text in (b"hello\nworld\n", b"hello", b'{"a": 1}\n'):
        path.write_bytes(text)
        with pytest.raises(errors.ResultsError, match="no results file"):
            run(trained, digits, results=path)
        assert path.read_bytes() == text
    with pytest.raises(errors.ResultsError, match="cannot be written"):
        run(trained, digits, results=path / "below")
    with pytest.raises(errors.ResultsError, match="cannot be read"):
        Report.load(tmp_path / "nothing")


# --- bad input ---


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf, [0.1, -1], [], [[0.1]], "a", None, [0.1, math.nan]], ids=str)
def test_bad_eps(trained, digits, eps):
    with pytest.raises(errors.InvalidInputError, match="eps"):
        run(trained, digits, eps=eps)


def test_bad_methods_and_options(trained, digits):
    with pytest.raises(errors.UnknownMethodError, match="known are"):
        run(trained, digits, method="nonsense")
    with pytest.raises(errors.UnknownMethodError):
        run(trained, digits, method=None)
    with pytest.raises(errors.OptionError, match="no option"):
        run(trained, digits, options={"nonsense": 1})
    with pytest.raises(errors.EstimateError, match="estimates"):
        run(trained, digits, options={"norms": "estimate"})
    for options in ({"norm": 0.5}, {"norm": math.nan}, {"batch_size": 0}, {"radius": -1.0}, {"dtype": torch.int8},
                    {"radius": 0.0}, {"norm": 1}, {"x_L": 1.0, "x_U": 0.0}, {"x_L": torch.zeros(3, 7)},
                    {"device": "nonsense"}, {"seed": 0.5}):  # fmt: skip
        with pytest.raises(errors.InvalidInputError):
            run(trained, digits, **options)


def test_bad_images_and_labels(trained, digits):
    x, y = digits
    broken = x.clone()
    broken[4, 0, 0, 0] = math.nan
    with pytest.raises(errors.InvalidInputError, match=r"NaN.*sample 4"):
        run(trained, (broken, y))
    with pytest.raises(errors.InvalidInputError, match=r"data range \[0.0, 1.0\], first sample 0"):
        run(trained, (x * 2, y))
    with pytest.raises(errors.InvalidInputError, match="labels"):
        run(trained, (x, y + 9))
    with pytest.raises(errors.InvalidInputError, match="labels"):
        run(trained, (x, y.float()))
    with pytest.raises(errors.InvalidInputError, match=r"shape \(1, 1, 4, 4\)"):
        run(trained, (x[:, :, :4, :4], y))


@pytest.mark.parametrize("data", [
    (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)),
    [],
    DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))),
    (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long)),
    (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)),
    TensorDataset(torch.zeros(3, 1, 8, 8)),
    7,
], ids=["empty tensors", "empty list", "empty loader", "unequal", "bytes", "no labels", "a number"])  # fmt: skip
def test_bad_data(trained, data):
    with pytest.raises(errors.DataError):
        run(trained, data)


def test_bad_models(digits):
    with pytest.raises(errors.TrainModeError, match="batch norm"):
        run(nn.Sequential(nn.BatchNorm2d(1), network()).train(), digits)
    run(nn.Sequential(nn.BatchNorm2d(1), network()).eval(), (digits[0][:2], digits[1][:2]))
    with pytest.raises(errors.InvalidInputError, match="torch module"):
        run(lambda x: x, digits)
    with pytest.raises(errors.InvalidInputError, match="logits"):
        run(nn.Identity(), digits)

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return torch.linalg.matrix_exp(self.inner(x).unsqueeze(2) * torch.eye(10).to(x)).sum(2)

    with pytest.raises(errors.TraceError):
        run(Untraceable(), digits)
    module = nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(64, 10)))
    module(digits[0])
    with pytest.raises(errors.TraceError, match="copied"):
        run(module, digits)


def test_bad_sources(tmp_path):
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05\0\0\0\x02\0\0\0\x02abc")
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    for source, text in (
        ("nonsense", "there is no 'nonsense': give"), (str(tmp_path), "neither"), (str(tmp_path / "idx"), "truncated"),
        (str(tmp_path / "x.npz"), "no .npz that can be read"), ("a.npy,b.npy", "is missing"),
        ("a,b,c", "names 3 files"),
    ):  # fmt: skip
        with pytest.raises(errors.DataError, match=text):
            load_data(source)
    with pytest.raises(errors.DataError, match="split"):
        load_data("digits", "validation")
