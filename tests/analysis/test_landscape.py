"""Smoothness of a loss in the weights: closed forms, what is put back, and the callback in runs on the digits."""

from __future__ import annotations

import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lirpa_ext.analysis import Measures, SmoothnessTrace, plot_smoothness, smoothness
from lirpa_ext.analysis.landscape import LENGTHS, log_lengths
from lirpa_ext.cli import main
from lirpa_ext.errors import ConfigError, InvalidInputError, ResultsError
from lirpa_ext.reporting.plots import alt_text, read_alt

ROOT = Path(__file__).resolve().parents[2]


# --- the function ---


@pytest.fixture
def quadratic():
    """(H, theta, loss): loss(theta) = theta' H theta / 2 with a positive definite H, in float64."""
    root = torch.randn(6, 6, dtype=torch.float64)
    hessian = root @ root.T + 0.1 * torch.eye(6, dtype=torch.float64)
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    return hessian, theta, lambda: theta @ hessian @ theta / 2


def test_a_quadratic_loss_has_its_closed_forms(quadratic):
    hessian, theta, loss_fn = quadratic
    eta, g = 0.03, hessian @ theta.detach()
    found = smoothness(loss_fn, [theta], eta)
    # L(theta - s g) = L - s g'g + s^2 g'Hg / 2
    along = [loss_fn().item() - s * g @ g + s * s / 2 * g @ hessian @ g for s in (0, *(eta * k for k in LENGTHS))]
    assert found.loss == pytest.approx(loss_fn().item(), rel=1e-12)
    assert found.highest == pytest.approx(float(max(along)), rel=1e-10)
    assert found.lowest == pytest.approx(float(min(along)), rel=1e-10)
    assert found.variation == found.highest - found.lowest > 0
    after = g - eta * hessian @ g
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert found.gradient_distance == pytest.approx(float((eta * hessian @ g).norm()), rel=1e-10)
    assert found.cosine_distance == pytest.approx(float(1 - g @ after / g.norm() / after.norm()), abs=1e-12)


def test_the_step_may_be_another_than_gradient_descent(quadratic):
    hessian, theta, loss_fn = quadratic
    following = theta.detach() + 0.1
    found = smoothness(loss_fn, [theta], 0.03, [following])
    assert found.gradient_distance == pytest.approx(float((hessian @ (following - theta.detach())).norm()), rel=1e-10)


def test_a_linear_loss_varies_in_proportion_and_keeps_its_gradient():
    slope = torch.tensor([3.0, -4.0], dtype=torch.float64)
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = smoothness(lambda: theta @ slope, [theta], 0.1)
    assert found.variation == pytest.approx(5 * 0.1 * 25)
    assert found.gradient_distance == 0 and found.cosine_distance == pytest.approx(0, abs=1e-15)


def test_weights_that_the_loss_does_not_read_count_as_zero():
    theta, idle = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = smoothness(lambda: theta.square().sum(), [theta, idle], 0.1)
    assert found.gradient_norm == pytest.approx(math.sqrt(8))


def test_a_kink_is_less_smooth_than_a_parabola_of_the_same_slope():
    """|theta| past 0: the gradient turns around at once."""
    theta = torch.tensor([0.05], requires_grad=True)
    kink = smoothness(lambda: theta.abs().sum(), [theta], 0.1)
    assert kink.cosine_distance == 2 and kink.gradient_distance == 2
    assert smoothness(lambda: 10 * theta.square().sum(), [theta], 0.01).cosine_distance == 0


def test_weights_are_put_back_bit_by_bit_even_after_an_error():
    model = nn.Linear(5, 3)
    x, before = torch.randn(4, 5), copy.deepcopy(model.state_dict())
    smoothness(lambda: model(x).exp().sum(), model.parameters(), 0.1)
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return model(x).exp().sum()

    with pytest.raises(RuntimeError, match="in the middle"):
        smoothness(fails, model.parameters(), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_what_is_not_finite_is_said():
    theta = torch.tensor([1.0], requires_grad=True)
    blown = smoothness(lambda: (theta - 0.9).sqrt().sum() + theta.square().sum(), [theta], 0.1)
    assert math.isnan(blown.highest) and math.isnan(blown.variation)  # the root of a negative number on the way
    at_rest = smoothness(lambda: (theta * 0).sum(), [theta], 0.1)
    assert math.isnan(at_rest.cosine_distance) and at_rest.gradient_distance == 0


def test_arguments_out_of_range_are_refused():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(InvalidInputError, match="must be positive"):
        smoothness(lambda: theta.sum(), [theta], 0.0)
    with pytest.raises(InvalidInputError, match="one tensor for each"):
        smoothness(lambda: theta.sum(), [theta], 0.1, [torch.ones(3)])
    with pytest.raises(InvalidInputError, match="1 or more points"):
        log_lengths(0)
    with pytest.raises(InvalidInputError, match="scheduled or of the target"):
        SmoothnessTrace(()).chosen("other")


def test_lengths_are_even_on_a_log_scale():
    ratios = [b / a for a, b in itertools.pairwise(LENGTHS)]
    assert len(LENGTHS) == 10 and LENGTHS[-1] == 5 and ratios == pytest.approx([ratios[0]] * 9)
    assert log_lengths(1, 2.0) == (2.0,)


# --- the trace ---


def trace_of(*variations: float) -> SmoothnessTrace:
    """At steps 0, 1, ...: eps rises from 0 by 0.1, the target is 0.3; the target's variation is twice as high."""
    records = []
    for step, variation in enumerate(variations):
        for at, eps, factor in (("scheduled", min(0.1 * step, 0.3), 1), ("target", 0.3, 2)):
            measures = Measures(1.0, 1.0 - factor * variation, 1.0, 2.0, 0.5, 0.25)
            values = vars(measures) | {"variation": measures.variation, "seconds": 0.1}
            records.append({"step": step, "epoch": 0, "at": at, "eps": eps} | values)
    return SmoothnessTrace(tuple(records))


def test_medians_are_those_of_the_ramp():
    trace = trace_of(0.9, 0.1, 0.3, 0.7, 0.8)  # steps 1 and 2 are within the ramp
    assert trace.median("variation", ramp=True) == pytest.approx(0.2)
    assert trace.median("variation", "target", ramp=True) == pytest.approx(0.4)
    assert trace.median("variation") == pytest.approx(0.7)
    assert math.isnan(SmoothnessTrace(()).median("variation"))


def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = trace_of(0.1, 0.2)
    trace.save(tmp_path / "smoothness")
    loaded = SmoothnessTrace.load(tmp_path / "smoothness.json")
    assert loaded == trace and loaded.summary() == trace.summary() != ""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ResultsError, match="holds no SmoothnessTrace"):
        SmoothnessTrace.load(tmp_path / "other.json")


def test_the_plot_is_of_the_numbers():
    traces = {"a": trace_of(0.1, 0.2, 0.4), "b": trace_of(0.3, 0.3, 0.3)}
    drawn = plot_smoothness(traces, "target")
    assert "target" in alt_text(drawn) and "a: variation 0.4" in alt_text(drawn)
    _, variation, distance, cosine = drawn.axes
    assert [line.get_label() for line in variation.lines] == ["a", "b"]
    assert list(variation.lines[0].get_ydata()) == pytest.approx([0.2, 0.4, 0.8])
    assert set(distance.lines[1].get_ydata()) == {0.5} and set(cosine.lines[1].get_ydata()) == {0.25}
    assert len({(line.get_color(), line.get_linestyle()) for line in variation.lines}) == 2


def test_runs_are_compared_from_their_files(tmp_path, capsys):
    for name, variations in (("rough", (0.9, 0.6, 0.8)), ("smooth", (0.9, 0.1, 0.3))):
        trace_of(*variations).save(tmp_path / name / "smoothness")
    folders = [str(tmp_path / name) for name in ("rough", "smooth")]
    assert main(["analyze", "smoothness", *folders, "--out", str(tmp_path)]) == 0
    assert "at the scheduled loss, from the smoothest: smooth 0.2, rough 0.7." in capsys.readouterr().out
    rows = json.loads((tmp_path / "smoothness.json").read_text())["rows"]
    assert [(row["run"], row["at"], row["steps"]) for row in rows][:2] == [
        ("rough", "scheduled", 2), ("rough", "target", 2)
    ]  # fmt: skip
    assert [row["variation"] for row in rows] == pytest.approx([0.7, 1.4, 0.2, 0.4])
    assert "smooth: variation 0.3" in read_alt(tmp_path / "smoothness.png")
    assert main(["analyze", "smoothness", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize("name", ["digits", "digits_sparsity", "mnist"])
@pytest.mark.parametrize("at", ["scheduled", "target"])
def test_the_tables_of_the_docs_are_those_of_the_benchmark(name, at):
    pytest.importorskip("lightning", reason="the benchmark trains by Lightning")
    spec = importlib.util.spec_from_file_location("landscape", ROOT / "benchmarks" / "landscape.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = json.loads((ROOT / "benchmarks" / f"landscape_{name}.json").read_text())["medians_of_the_ramp"]
    assert benchmark.table(found, at) in (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")


# --- the callback ---


def quick(folder: Path, *arguments: str, every: int = 3, config: str = "digits_bcp") -> int:
    pytest.importorskip("lightning", reason="training needs Lightning")
    pytest.importorskip("jsonargparse", reason="training needs jsonargparse")
    callbacks = [{"class_path": "lirpa_ext.analysis.Smoothness", "init_args": {"every": every, "points": 4}}]
    return main([
        "fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--data.limit", "260", "--data.validation", "20",
        "--data.batch_size", "40", "--trainer.max_epochs", "2", "--model.schedule.warmup", "0.5",
        "--model.schedule.ramp", "1", "--model.evaluation.attack_steps", "0", "--trainer.accelerator", "cpu",
        "--trainer.logger", "false", "--progress", "false", "--run", str(folder),
        *(["--trainer.callbacks", json.dumps(callbacks)] if every else []), *arguments,
    ])  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "last.ckpt", weights_only=True)
    return content["state_dict"] | content["lirpa_ext"]["power_iterations"]


LINF = ["--model.norm", "inf", "--model.eps", "0.1"]
ONCE = [f"--model.evaluation.{name}=1" for name in ("draws", "attack_draws", "attack_steps")]


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        pytest.param("digits_bcp", ["--model.eps", "0.1"], id="power iterations"),
        pytest.param("digits_bcp", [*LINF, "--model.loss.name", "sparse-slope"], id="slopes drawn at random"),
        pytest.param("digits_adv-bnn_graddiv", [*LINF, *ONCE], id="a randomized network"),
    ],
)
def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path, config, arguments):
    assert quick(tmp_path / "measured", *arguments, config=config) == 0
    assert quick(tmp_path / "plain", *arguments, config=config, every=0) == 0
    measured, plain = weights(tmp_path / "measured"), weights(tmp_path / "plain")
    assert measured.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in measured.items())
    trace = SmoothnessTrace.load(tmp_path / "measured" / "smoothness.json")
    assert [row["step"] for row in trace.chosen()] == [0, 3, 6, 9]
    assert {row["eps"] for row in trace.chosen("target")} == {0.1}
    eps = [row["eps"] for row in trace.chosen()]
    assert eps[0] == 0 and eps[-1] == 0.1 and eps == sorted(eps)
    for row in trace.rows():
        assert row["lowest"] <= row["loss"] <= row["highest"] and row["gradient_distance"] > 0
        assert 0 <= row["cosine_distance"] <= 2
    with (tmp_path / "measured" / "smoothness.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert "Smoothness of the scheduled loss" in read_alt(tmp_path / "measured" / "smoothness.png")


def test_the_measures_of_a_run_are_those_of_its_loss(tmp_path):
    """Natural training by plain gradient descent, against cross entropy and its gradients written out."""
    pytest.importorskip("lightning", reason="training needs Lightning")
    from lightning.pytorch import Trainer

    from lirpa_ext.analysis import Smoothness
    from lirpa_ext.training import CertifiedClassifier, Loss, Network, Optimizer
    from lirpa_ext.training.batches import Batches

    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    module = CertifiedClassifier(
        Network("2C2F", [1, 8, 8]), Loss("natural"), 0.1, optimizer=Optimizer("sgd", lr=0.1)
    )  # fmt: skip
    model = copy.deepcopy(module.model).double()
    callback = Smoothness(every=1, points=2, longest=3.0)
    trainer = Trainer(
        max_steps=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0,
            default_root_dir=tmp_path,
    )  # fmt: skip
    batches = Batches(x, y, 8)
    trainer.fit(module, train_dataloaders=batches)
    (scheduled, target) = callback.trace.rows()
    assert scheduled["eps"] == 0.1 and target["seconds"] == 0.0  # no ramp: measured once

    def loss_at(steps: float) -> tuple[float, torch.Tensor]:
        moved = copy.deepcopy(model)
        for weight, g in zip(moved.parameters(), start, strict=True):
            weight.data -= 0.1 * steps * g
        loss = nn.functional.cross_entropy(moved(x.double()), y)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(moved.parameters()))])

    loss = nn.functional.cross_entropy(model(x.double()), y)
    start = torch.autograd.grad(loss, list(model.parameters()))
    g, after = torch.cat([part.flatten() for part in start]), loss_at(1)[1]
    losses = [loss_at(steps)[0] for steps in (0, 0.03, 3.0)]
    assert scheduled["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert scheduled["variation"] == pytest.approx(max(losses) - min(losses), rel=1e-3)
    assert scheduled["gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-4)
    assert scheduled["gradient_distance"] == pytest.approx(float((after - g).norm()), rel=1e-2)
    cosine = 1 - float(g @ after / g.norm() / after.norm())
    assert scheduled["cosine_distance"] == pytest.approx(cosine, rel=2e-2, abs=1e-6)


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_with_its_records(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="training needs Lightning")
    from lirpa_ext.training.module import CertifiedClassifier

    assert quick(tmp_path / "whole") == 0
    step, calls = CertifiedClassifier.training_step, []

    def dies(self, batch, index):
        calls.append(index)
        if len(calls) == 8:
            raise Killed
        return step(self, batch, index)

    monkeypatch.setattr(CertifiedClassifier, "training_step", dies)
    with pytest.raises(Killed):
        quick(tmp_path / "killed", "--checkpoint_every", "1")
    monkeypatch.setattr(CertifiedClassifier, "training_step", step)
    assert quick(tmp_path / "killed", "--checkpoint_every", "1") == 0
    whole, resumed = (SmoothnessTrace.load(tmp_path / name / "smoothness.json").rows() for name in ("whole", "killed"))
    for row in [*whole, *resumed]:
        del row["seconds"]
    assert whole == resumed


@pytest.mark.slow
def test_of_two_processes_the_first_measures(tmp_path):
    """And both train as they would have."""
    pytest.importorskip("lightning", reason="training needs Lightning")
    for name, every in (("measured", 3), ("plain", 0)):
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            "from pathlib import Path; import test_landscape\n"
            f"sys.exit(test_landscape.quick(Path({str(tmp_path / name)!r}), '--trainer.devices', '2', "
            f"'--trainer.strategy', 'ddp', every={every}))"
        )
        (tmp_path / f"{name}.py").write_text(code)  # Lightning starts it anew for the second process
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(
            [sys.executable, str(tmp_path / f"{name}.py")],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    measured, plain = weights(tmp_path / "measured"), weights(tmp_path / "plain")
    assert all(torch.equal(value, plain[name]) for name, value in measured.items())
    trace = SmoothnessTrace.load(tmp_path / "measured" / "smoothness.json")
    assert [row["step"] for row in trace.chosen()] == [0, 3, 6, 9]


def test_a_batch_norm_keeps_its_statistics(tmp_path):
    pytest.importorskip("lightning", reason="training needs Lightning")
    from lightning.pytorch import Trainer

    from lirpa_ext.analysis import Smoothness
    from lirpa_ext.training import CertifiedClassifier, Loss, Network, Schedule
    from lirpa_ext.training.batches import Batches

    x, y, states = torch.rand(16, 1, 8, 8), torch.arange(16) % 4, []
    for callbacks in ([], [Smoothness(every=1)]):
        torch.manual_seed(3)
        module = CertifiedClassifier(
            Network("2C2F", [1, 8, 8], classes=4), Loss("ibp"), 0.05, math.inf, Schedule(kappa=[0.5, 0.5])
        )
        module.model = nn.Sequential(nn.BatchNorm2d(1), module.model)
        trainer = Trainer(
            max_steps=3, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, train_dataloaders=Batches(x, y, 8))
        states.append(module.model.state_dict())
    assert states[0]["0.num_batches_tracked"] == 3
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_modules_and_numbers_out_of_range_are_refused():
    pytest.importorskip("lightning", reason="training needs Lightning")
    from lightning.pytorch import LightningModule

    from lirpa_ext.analysis import Smoothness

    with pytest.raises(ConfigError, match="every and points of 1 or more"):
        Smoothness(every=0)
    with pytest.raises(ConfigError, match="not of a LightningModule"):
        Smoothness().setup(None, LightningModule(), "fit")
