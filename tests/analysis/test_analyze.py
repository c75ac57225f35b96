"""Layers through training, and ``lirpa-ext analyze``: records of a real run, resume, the table, folders and files."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lirpa_ext import lipschitz
from lirpa_ext.analysis import ActivityTrace, LipschitzTrace, relu_activity
from lirpa_ext.analysis.traces import BEFORE_LAST, PRODUCT, activity_record, lipschitz_records
from lirpa_ext.cli import _parser, main
from lirpa_ext.cli.task import ANALYSES, Analysis, register_analysis
from lirpa_ext.errors import ConfigError, InvalidInputError, RegistrationError, ResultsError
from lirpa_ext.models.loading import load_model
from lirpa_ext.reporting.plots import figure, read_alt

ROOT = Path(__file__).resolve().parents[2]


def chain(*scales: float) -> nn.Module:
    """Dense layers that multiply by these numbers, with ReLUs between."""
    layers: list[nn.Module] = []
    for scale in scales:
        layer = nn.Linear(2, 2)
        layer.weight.data, layer.bias.data = scale * torch.eye(2), torch.zeros(2)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# --- records ---


def test_lipschitz_records_in_closed_form():
    rows = {row["layer"]: row["bound"] for row in lipschitz_records(chain(2.0, 3.0, 5.0), torch.zeros(4, 2))}
    assert rows == pytest.approx({"0.weight": 2, "2.weight": 3, "4.weight": 5, BEFORE_LAST: 6, PRODUCT: 30}, rel=1e-6)
    assert rows[PRODUCT] >= 30 and rows[BEFORE_LAST] >= 6  # bounds, from above


def trace(**runs: list[float]) -> LipschitzTrace:
    """One linear layer and a last one; the bounds of the first, by epoch."""
    return LipschitzTrace(tuple(
        {"run": run, "epoch": epoch, "step": 10 * epoch, "eps": min(epoch, 2) / 2}
        | {"layer": layer, "bound": scale * bound}
        for run, bounds in runs.items()
        for epoch, bound in enumerate(bounds)
        for layer, scale in ((BEFORE_LAST, 1.0), (PRODUCT, 4.0))
    ))  # fmt: skip


def test_ratio_of_two_runs():
    found = trace(bcp=[2.0, 3.0, 6.0, 8.0], lmt=[2.0, 2.0, 3.0])
    assert found.ratio("bcp", "lmt") == [(0, 1.0), (1, 1.5), (2, 2.0)]
    assert found.values("lmt", PRODUCT) == [(0, 8.0), (1, 8.0), (2, 12.0)]
    assert found.ramp_end("bcp") == 2
    assert "ends at 2" in found.summary()


def test_activity_record_of_known_boxes():
    """On |x| <= 1 the boxes b - 1, b + 1 are active, dead and unstable with a chord of 3/4, where CROWN takes 1."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data, model[0].bias.data = torch.ones(3, 1), torch.tensor([2.0, -2.0, 0.5])
    x, y = torch.zeros(2, 1), torch.tensor([0, 1])
    record = activity_record(model, x, y, 1.0, "slope:crown", norm=math.inf, x_L=None, x_U=None)
    assert record == {"active": 1.0, "unstable": 1.0, "dead": 1.0, "chord": 0.75, "nonzero": 1.0}
    stable = activity_record(model, x, y, 0.1, "slope:crown", norm=math.inf)
    assert stable == {"active": 2.0, "unstable": 0.0, "dead": 1.0, "chord": None, "nonzero": None}
    assert activity_record(model, x, y, 1.0, None, norm=2)["nonzero"] is None


def test_traces_are_drawn_by_run_and_read_back(tmp_path):
    found = trace(bcp=[2.0, 3.0, 6.0], lmt=[2.0, 2.0, 3.0])
    axes = figure("a test")[1][0, 0]
    found.plot(axes, BEFORE_LAST)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 2], [1, 3], [2, 6]])
    assert axes.get_yscale() == "log" and axes.lines[2].get_xdata()[0] == 2  # the end of the ramp
    with pytest.raises(InvalidInputError, match="no panel"):
        found.plot(axes, "speed")
    for run in ("bcp", "lmt"):
        LipschitzTrace(tuple(row for row in found.records if row["run"] == run)).save(tmp_path / run / "lipschitz")
    assert LipschitzTrace.read({"bcp": tmp_path / "bcp", "lmt": tmp_path / "lmt"}) == found
    with pytest.raises(ResultsError, match="LipschitzConstants among"):
        LipschitzTrace.read({"none": tmp_path})
    shutil.copy(tmp_path / "bcp" / "lipschitz.json", tmp_path / "activity.json")
    with pytest.raises(ResultsError, match="no ActivityTrace"):
        ActivityTrace.read({"other": tmp_path})


# --- runs ---

QUICK = [
    "--config", str(ROOT / "configs" / "digits_bcp.yaml"), "--data.limit", "140", "--data.validation", "20",
    "--data.batch_size", "40", "--data.test_limit", "30", "--model.schedule.warmup", "0.3",
    "--model.schedule.ramp", "0.3", "--model.evaluation.attack_steps", "0", "--model.loss.name", "crown-ibp",
    "--model.norm", "inf", "--model.eps", "0.02", "--trainer.accelerator", "cpu",
    "--trainer.logger", "false", "--progress", "false",
]  # fmt: skip
CALLBACKS = [
    "--trainer.callbacks",
    "[{class_path: lirpa_ext.analysis.LipschitzConstants}, {class_path: lirpa_ext.analysis.ReluActivity, "
    "init_args: {samples: 10}}]",
]


def fit(folder: Path, *arguments: str, epochs: int = 2) -> None:
    pytest.importorskip("lightning", reason="training needs Lightning")
    pytest.importorskip("jsonargparse", reason="training needs jsonargparse")
    assert main(["fit", *QUICK, "--trainer.max_epochs", str(epochs), "--run", str(folder), *arguments]) == 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with both callbacks."""
    folder = tmp_path_factory.mktemp("runs") / "crown"
    fit(folder, *CALLBACKS)
    return folder


def test_callbacks_record_each_epoch(recorded):
    norms, neurons = LipschitzTrace.read({"r": recorded}), ActivityTrace.read({"r": recorded})
    assert [row["epoch"] for row in neurons.records] == [0, 1, 2]
    assert [epoch for epoch, _ in norms.values("r", PRODUCT)] == [0, 1, 2]
    assert [row["step"] for row in neurons.records] == [0, 3, 6]
    assert neurons.records[0]["eps"] == 0 and neurons.records[-1]["eps"] == 0.02
    assert neurons.records[0]["nonzero"] is None and 0 < neurons.records[-1]["nonzero"] < 1
    last = load_model(recorded / "model.pt")
    last.load_state_dict({
        name.removeprefix("model."): value
        for name, value in torch.load(recorded / "last.ckpt", weights_only=True)["state_dict"].items()
    })  # fmt: skip
    expected = lipschitz(last, torch.zeros(1, 1, 8, 8), verbose=False)
    assert norms.values("r", PRODUCT)[-1][1] == pytest.approx(expected.product, rel=1e-6)
    assert {row["layer"] for row in norms.records} == {layer.name for layer in expected.layers} | {PRODUCT, BEFORE_LAST}
    total = [sum(row[state] for state in ("active", "unstable", "dead")) for row in neurons.records]
    assert total == pytest.approx([16 * 16 + 32 * 4 + 100] * 3)
    for name in ("lipschitz", "activity"):
        assert read_alt(recorded / f"{name}.png")


def test_training_is_the_same_without_them(recorded, tmp_path):
    fit(tmp_path)
    own, other = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (recorded, tmp_path))
    for name, weight in own["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name


def test_a_resumed_run_has_the_same_records(recorded, tmp_path):
    fit(tmp_path, *CALLBACKS, "--trainer.max_epochs", "1")
    fit(tmp_path, *CALLBACKS)
    for name in ("lipschitz", "activity"):
        assert (tmp_path / f"{name}.csv").read_text() == (recorded / f"{name}.csv").read_text()


def test_callbacks_say_what_is_wrong():
    pytest.importorskip("lightning", reason="training needs Lightning")
    from lightning.pytorch import LightningModule

    from lirpa_ext.analysis import LipschitzConstants, ReluActivity

    with pytest.raises(ConfigError, match="samples of 1 or more"):
        ReluActivity(samples=0)
    with pytest.raises(ConfigError, match="CertifiedClassifier"):
        LipschitzConstants().setup(None, LightningModule(), "fit")


# --- the command ---


def analyze(*arguments: object) -> int:
    return main(["analyze", *(str(argument) for argument in arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


SETTINGS = ("--limit", "12")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("outer", ("--sample", 2)),
        ("tightness", ("--methods", "sparse-slope", "slope:crown", "--option", "sparse-slope.eta=2.0")),
        ("curves", ("--eps", "0.01,0.03", "--methods", "slope:ibp", "--attack-steps", 5)),
        ("activity", ("--intermediate", "bcp")),
        ("slopes", ("--eps", "0.01,0.03")),
    ],
)
def test_a_run_brings_its_settings(recorded, tmp_path, capsys, name, arguments):
    """Norm, eps, data and range are those of the folder's configuration."""
    assert analyze(name, recorded, *SETTINGS, *arguments, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "linf" in shown and f"written to {tmp_path}" in shown
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["summary"] in shown and len(rows(tmp_path / f"{name}.csv")) == len(content["rows"]) > 0
    assert read_alt(tmp_path / f"{name}.png") == content["summary"]
    if "--eps" not in arguments:
        assert "eps 0.02" in shown


def test_numbers_are_those_of_the_function(recorded, tmp_path):
    from lirpa_ext.data import load_data

    assert analyze("activity", recorded / "model.pt", "--data", "digits", *SETTINGS, "--norm", "inf", "--eps", "0.02",
                   "--out", tmp_path) == 0  # fmt: skip
    found = relu_activity(
        load_model(recorded / "model.pt"), load_data("digits", "test", 12), 0.02, norm=math.inf, x_L=0.0, x_U=1.0
    )
    assert [float(row["unstable"]) for row in rows(tmp_path / "activity.csv")] == [
        row["unstable"] for row in found.rows()
    ]


def test_several_models(recorded, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(recorded, other)
    assert analyze("curves", recorded, other, *SETTINGS, "--methods", "slope:ibp", "--attack-steps", 0) == 0
    assert "crown" in (shown := capsys.readouterr().out) and "other" in shown
    assert analyze("lipschitz", recorded, other, "--out", tmp_path) == 0
    assert {row["run"] for row in rows(tmp_path / "lipschitz.csv")} == {"crown", "other"}
    assert analyze("training-activity", recorded, other) == 0
    assert analyze("tightness", recorded, other) == 2
    assert "takes one model, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("activity", "{run}/model.pt", "--eps", "0.1"), "pass --data"),
        (("activity", "{run}/nothing"), "nothing: give the folder of a run"),
        (("activity", "{run}/model.pt", "--data", "digits"), "pass --eps"),
        (("activity", "{run}", "--eps", "0.1,0.2"), "takes one --eps"),
        (("activity", "{empty}"), "no folder of a run"),
        (("outer", "{run}", "--sample", "5000"), "--sample 5000 is none"),
        (("tightness", "{run}", "--option", "eta=2"), "METHOD.KEY=VALUE"),
        (("tightness", "{run}", "--option", "CROWN.eta=2"), "none of the methods"),
        (("slopes", "{run}", "--methods", "bcp"), "no lower slopes"),
        (("activity", "{run}", "--data-range", "0,1,2"), "LO,HI"),
        (("lipschitz", "{empty}"), "LipschitzConstants"),
        (("trade-off", "{empty}"), "no table of a sweep"),
    ],
)
def test_errors_say_what_to_do(recorded, tmp_path, capsys, arguments, told):
    given = [text.format(run=recorded, empty=tmp_path) for text in arguments]
    assert analyze(*given) == 2
    assert told in capsys.readouterr().err


def test_a_new_analysis_is_an_entry_of_the_table(recorded, capsys):
    from lirpa_ext.analysis import tightness
    from lirpa_ext.analysis.tightness import plot_tightness

    def run(task):
        result = tightness(task.model, task.data, task.eps, ["slope:ibp"], **task.ball)
        drawn, axes = figure(result.summary())
        plot_tightness(result, axes[0, 0], "loss")
        return result, drawn

    entry = Analysis(run, "an example")
    register_analysis("test-example", entry)
    try:
        with pytest.raises(RegistrationError, match="overwrite=True"):
            register_analysis("test-example", entry)
        assert analyze("test-example", recorded, *SETTINGS) == 0
        assert "slope:ibp" in capsys.readouterr().out
    finally:
        del ANALYSES["test-example"]


def test_every_analysis_has_a_help(capsys):
    for name in ANALYSES:
        with pytest.raises(SystemExit) as exit:
            _parser().parse_args(["analyze", name, "--help"])
        assert exit.value.code == 0
        assert " ".join(ANALYSES[name].help.split()) in " ".join(capsys.readouterr().out.split())
