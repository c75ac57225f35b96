"""Training: schedules, networks, batches, resume, processes, export, configurations."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lirpa_ext
from lirpa_ext.cli import main
from lirpa_ext.errors import ConfigError, DataError, RegistrationError
from lirpa_ext.models.architectures import named_network
from lirpa_ext.models.loading import load_model
from lirpa_ext.training import ARCHITECTURES, OBJECTIVES, Loss, Network, build, register_objective
from lirpa_ext.training.augmentation import augment
from lirpa_ext.training.batches import Batches, train_validation_split
from lirpa_ext.training.batchnorm import differs_in_training, fixed_statistics, recorded_statistics
from lirpa_ext.training.objectives import Objective, Step, step_loss
from lirpa_ext.training.schedules import Decay, Ramp, Schedule, Values

pytest.importorskip("lightning", reason="training needs Lightning")
pytest.importorskip("jsonargparse", reason="training needs jsonargparse")

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# The digits at a size that trains in seconds; the ramp ends within the second of three epochs.
QUICK = [
    "--config", str(ROOT / "configs" / "digits_bcp.yaml"), "--data.limit", "260", "--data.validation", "20",
    "--data.batch_size", "40", "--data.test_limit", "30", "--trainer.max_epochs", "3", "--model.schedule.warmup", "0.5",
    "--model.schedule.ramp", "1", "--model.evaluation.attack_steps", "2", "--model.evaluation.final_attack_steps", "3",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
]  # fmt: skip


def run(folder: Path, *arguments: str, command: str = "fit") -> int:
    return main([command, *QUICK, "--run", str(folder), *arguments])


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same_weights(a: dict, b: dict, atol: float = 0.0) -> None:
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=atol)
    for name, u in a["lirpa_ext"]["power_iterations"].items():
        torch.testing.assert_close(u, b["lirpa_ext"]["power_iterations"][name], rtol=0, atol=atol)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished quick run."""
    folder = tmp_path_factory.mktemp("run")
    assert run(folder) == 0
    return folder


# --- schedules ---


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.3), (1.0, 0.0), (0.1, 0.7), (1.0, 1.0), (0.0, 36 / 255)])
@pytest.mark.parametrize(("warmup", "ramp"), [(0, 1), (7, 13), (3, 0), (0, 0), (10, 999)])
def test_ramp_is_exact_at_its_end_and_never_beyond(start, end, warmup, ramp):
    values = [Ramp(start, end).at(step, warmup, ramp) for step in range(warmup + ramp + 5)]
    assert values[:warmup] == [start] * warmup
    last = max(warmup + ramp - 1, warmup)
    assert values[last:] == [end] * len(values[last:])
    assert all(min(start, end) <= value <= max(start, end) for value in values)
    rising = [b - a for a, b in itertools.pairwise(values)]
    assert all(step * (end - start) >= 0 for step in rising)
    if ramp > 1 and start != end:  # before its last step it has not arrived
        assert values[last - 1] != end


def test_schedule_moves_every_step_and_reaches_the_target_at_the_last_one_of_the_ramp():
    schedule = Schedule(warmup=1, ramp=2, kappa=[1.0, 0.0], beta=[1.0, 0.0])
    found = [schedule.at(step, per_epoch=4, eps=0.8) for step in range(14)]
    assert [value.eps for value in found[:4]] == [0.0] * 4
    np.testing.assert_allclose([value.eps for value in found[4:12]], np.arange(1, 9) / 10, rtol=1e-12)
    np.testing.assert_allclose([value.kappa for value in found[4:12]], 1 - np.arange(1, 9) / 8, rtol=1e-12)
    assert found[11:] == [Values(0.8, 0.0, 0.0)] * 3
    assert [schedule.done(steps, 4) for steps in (11, 12, 13)] == [False, True, True]


def test_schedule_counts_parts_of_epochs():
    schedule = Schedule(warmup=0.5, ramp=1.25)
    assert schedule.steps(10) == 18  # 17.5 rounds to 18
    assert [schedule.at(step, 10, 1.3).eps for step in (4, 5, 16, 17)] == pytest.approx([0.0, 0.1, 1.2, 1.3])


def test_the_weight_of_graddiv_has_a_ramp_of_its_own():
    schedule = Schedule(ramp=1, kappa=[0.0, 0.0], graddiv=[0.0, 0.5], graddiv_ramp=[2, 1])
    found = [schedule.at(step, per_epoch=2, eps=0.4) for step in range(8)]
    assert [value.eps for value in found] == [0.2] + [0.4] * 7
    assert [value.graddiv for value in found] == [0.0] * 4 + [0.25] + [0.5] * 3
    assert [schedule.done(steps, 2) for steps in (2, 5, 6)] == [False, False, True]
    assert schedule.steps(2) == 6
    with pytest.raises(ConfigError, match=r"the ramp ends after 2 \+ 1 epochs"):
        schedule.check(0.4, 3)
    for wrong, told in (([1], "warm-up, ramp"), ([1, -1], "0 or more"), ([math.nan, 1], "0 or more")):
        with pytest.raises(ConfigError, match=told):
            Schedule(graddiv_ramp=wrong).check(0.4, None)


def test_learning_rates_of_the_tables():
    mnist = Decay(milestones=[21, 30, 40], gamma=0.1)
    assert [round(mnist.factor(epoch), 6) for epoch in (0, 20, 21, 30, 40, 59)] == [1, 1, 0.1, 0.01, 0.001, 0.001]
    cifar = Decay(every=10, after=131, gamma=0.5)
    assert [cifar.factor(epoch) for epoch in (131, 140, 141, 151)] == [1, 1, 0.5, 0.25]


# --- networks ---


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("4C3F", [1, 28, 28], 10, 1974762), ("4C3F", [3, 32, 32], 10, 2466858), ("6C2F", [3, 32, 32], 10, 2250378),
        ("WRN", [3, 32, 32], 10, 4214850), ("8C2F", [3, 64, 64], 200, 4342984),
    ],
)  # fmt: skip
def test_networks_have_the_parameters_that_the_source_states(name, shape, classes, parameters):
    """Table 3.2."""
    assert sum(p.numel() for p in build(Network(name, shape, classes)).parameters()) == parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_takes_other_images_and_classes(name):
    side = {"8C2F": 40, "6C1F": 96}.get(name, 32)
    model = build(Network(name, [2, side, side], 7, mean=[0.5, 0.4], std=[0.2, 0.3]))
    x = torch.rand(2, 2, side, side)
    whitened = (x - torch.tensor([0.5, 0.4]).view(1, 2, 1, 1)) / torch.tensor([0.2, 0.3]).view(1, 2, 1, 1)
    torch.testing.assert_close(model(x), model[1](whitened))
    assert model(x).shape == (2, 7)


def test_a_checkpoint_cannot_name_code_of_its_own():
    with pytest.raises(ConfigError, match="none of"):
        named_network(name="os:getcwd", input_shape=[1, 8, 8])


def test_ibp_initialization_keeps_the_width_of_boxes():
    """Layer by layer the expected width of IBP's box stays; torch's own weights let it grow."""
    from lirpa_ext.training.module import _initialize

    widths = {}
    for name in ("default", "ibp"):
        model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(6)))
        _initialize(model, name)
        width = torch.ones(200)
        for layer in model:
            width = layer.weight.abs() @ width
        widths[name] = float(width.mean())
    assert widths["default"] > 100
    # |w| of N(0, s) has mean s sqrt(2 / pi), so a linear layer doubles the width; the ReLU after it halves it
    assert 0.5 * 2**6 < widths["ibp"] < 2 * 2**6


# --- batches ---


def test_batches_are_those_of_seed_epoch_and_step():
    x, y = torch.arange(23.0).view(23, 1, 1, 1), torch.arange(23)
    batches = Batches(x, y, 5, seed=3)
    first = [labels for _, labels in batches]
    assert len(first) == len(batches) == 4
    assert len(torch.cat(first).unique()) == 20
    batches.set_epoch(1)
    second = [labels for _, labels in batches]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    again = Batches(x, y, 5, seed=3)
    again.load_state_dict({"epoch": 1, "step": 2})
    torch.testing.assert_close([labels for _, labels in again], second[2:])
    assert not torch.equal(torch.cat([labels for _, labels in Batches(x, y, 5, seed=4)]), torch.cat(first))


def test_processes_share_the_joint_batch_augmented_alike():
    x, y = torch.rand(24, 3, 8, 8), torch.arange(24)
    joint = list(Batches(x, y, 8, augmentation="crop-flip"))
    parts = [list(Batches(x, y, 8, augmentation="crop-flip", rank=rank, world=2)) for rank in range(2)]
    for whole, *halves in zip(joint, *parts, strict=True):
        for position in range(2):
            torch.testing.assert_close(whole[position], torch.cat([half[position] for half in halves]))


def test_augmentation_shifts_with_zeros_and_flips():
    x = torch.arange(1.0, 26).view(1, 1, 5, 5).repeat(500, 1, 1, 1)
    moved = augment(x, "crop-flip", torch.Generator().manual_seed(0))
    centres = set()
    for image in moved[:, 0]:
        candidates = []
        for flipped in (False, True):
            plain = image.flip(1) if flipped else image
            padded = torch.nn.functional.pad(x[0, 0], [4] * 4)
            candidates += [
                (row, column, flipped)
                for row in range(9) for column in range(9)
                if torch.equal(padded[row : row + 5, column : column + 5], plain)
            ]  # fmt: skip
        assert candidates
        centres.update(candidates)
    assert len(centres) > 120  # of 162
    assert torch.equal(augment(x, "none", torch.Generator()), x)


def test_validation_samples_are_no_training_samples():
    train, validation = train_validation_split(torch.zeros(50, 1), torch.zeros(50), 20, seed=1)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(50))
    assert len(validation) == 20
    with pytest.raises(ConfigError, match="below 50"):
        train_validation_split(torch.zeros(50, 1), torch.zeros(50), 50, seed=1)


# --- losses ---


def step_of(model: nn.Module, norm: float, kappa: float, beta: float, eps: float = 0.1) -> Step:
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    bounded = lirpa_ext.BoundedModule(model, x)
    return Step(bounded, x, y, model(x), Values(eps, kappa, beta), norm, 0.0, 1.0)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if not objective.randomized])
@pytest.mark.parametrize("norm", [2, math.inf], ids=["l2", "linf"])
def test_losses_lie_above_those_of_attacked_points(name, norm):
    """A certified loss is at least the loss at any point of the set; PGD's is such a loss."""
    model = build(Network("2C2F", [1, 8, 8]))
    step = step_of(model, norm, kappa=0.0, beta=0.5, eps=0.02)
    for _ in range(30):  # estimated norms converge from below
        loss = step_loss(Loss(name), step)
    attacked = step_loss(Loss("pgd", attack_steps=20), step)
    clean = torch.nn.functional.cross_entropy(step.logits, step.y)
    if name == "natural":
        torch.testing.assert_close(loss, clean)
    else:
        assert loss >= (clean if name == "pgd" else attacked) - 1e-5
        assert attacked > clean
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_weights_of_the_mix_are_those_of_the_source():
    """(C.1.1) by hand from the two bounds."""
    model = build(Network("2C2F", [1, 8, 8]))
    step = step_of(model, math.inf, kappa=0.3, beta=0.25)
    interval, tight = (step.worst(method) for method in ("slope:ibp", "slope:crown"))
    ce = torch.nn.functional.cross_entropy
    expected = 0.3 * ce(step.logits, step.y) + 0.7 * ce(0.75 * interval + 0.25 * tight, step.y)
    torch.testing.assert_close(step_loss(Loss("crown-ibp"), step), expected)
    regularized = step_loss(Loss("crown-ibp", stability=0.5), step)
    stability = lirpa_ext.relu_stability_loss(step.bounded, step.x, 0.1, math.inf, 0.0, 1.0)
    torch.testing.assert_close(regularized, expected + 0.5 * stability)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_clean_logits_of_the_bound_are_those_of_the_model(name):
    """The loss and its gradients are the same where the bound's own clean pass serves."""
    model = build(Network("2C2F", [1, 8, 8]))
    step = step_of(model, 2, kappa=0.3, beta=0.25)
    step.bounded.eval()  # the power iterations stay
    results = []
    for logits in (step.logits, None):
        torch.manual_seed(0)
        loss = step_loss(Loss(name), dataclasses.replace(step, logits=logits))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results)


def test_layers_that_training_changes_have_clean_logits_of_their_own():
    layers = nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)
    assert not differs_in_training(nn.Sequential(layers[0]))
    for layer in layers[1:]:
        model = nn.Sequential(layers[0], layer)
        assert differs_in_training(model) and not differs_in_training(model.eval())
        model.train()


def test_a_fused_loss_lies_above_the_loss_of_all_rows():
    step = step_of(build(Network("2C2F", [1, 8, 8])), math.inf, kappa=0.0, beta=1.0)
    assert step_loss(Loss("crown-ibp", fused=True), step) >= step_loss(Loss("crown-ibp"), step) - 1e-6


def test_a_loss_of_the_users_own():
    register_objective("bcp-again", Objective("bcp", "bcp", estimate=True))
    try:
        step = step_of(build(Network("2C2F", [1, 8, 8])), 2, 0.0, 1.0)
        step.bounded.eval()  # the power iterations stay
        torch.testing.assert_close(step_loss(Loss("bcp-again"), step), step_loss(Loss("bcp"), step))
        with pytest.raises(RegistrationError, match="exists already"):
            register_objective("bcp-again", Objective())
    finally:
        del OBJECTIVES["bcp-again"]


def test_batch_norm_is_bounded_with_the_clean_batch_statistics():
    """At eps 0 the worst-case logits are the train-mode ones, with the gradient of fixed statistics."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10), nn.BatchNorm1d(10)
    ).double()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    bounded = lirpa_ext.BoundedModule(model.eval(), x)
    model.train()
    before = model[1].running_mean.clone()
    with recorded_statistics(model) as statistics:
        logits = model(x)
    moved = model[1].running_mean.clone()
    with fixed_statistics(statistics):
        worst = lirpa_ext.worst_case_logits(bounded, x, y, 0.0, "slope:ibp", math.inf, logits=logits)
        wider = lirpa_ext.worst_case_logits(bounded, x, y, 0.1, "slope:ibp", math.inf, logits=logits)
    torch.testing.assert_close(worst, logits)
    assert (wider >= logits - 1e-12).all()
    assert (wider > logits + 1e-3).any()
    assert (logits - model.eval()(x)).abs().max() > 0.1  # the population's are others
    model.train()
    fixed = model[0](x)
    for layer in list(model)[1:]:
        if layer in statistics:
            mean, variance = statistics[layer]
            fixed = torch.nn.functional.batch_norm(fixed, mean, variance, layer.weight, layer.bias)
        else:
            fixed = layer(fixed)
    found, expected = (
        torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), model[0].weight)[0] for z in (worst, fixed)
    )
    torch.testing.assert_close(found, expected)
    assert model.training and model[1].training
    assert not torch.equal(before, moved)
    torch.testing.assert_close(model[1].running_mean, moved)


# --- runs ---


def test_a_run_fills_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "metrics.csv", "learning_curve.png", "last.ckpt", "best.ckpt", "model.pt",
        "model.onnx", "README.md",
    }  # fmt: skip
    table = rows(trained)
    assert [row["ramp_done"] for row in table] == ["False", "True", "True"]
    assert [float(row["eps"]) for row in table] == [0.25, 0.5, 0.5]
    assert all(float(row["val_verified"]) <= float(row["val_pgd"]) <= float(row["val_clean"]) for row in table)
    card = (trained / "README.md").read_text()
    assert "2C2F trained with the bcp loss, l2 eps 0.5" in card
    best = checkpoint(trained, "best.ckpt")
    assert best["epoch"] >= 1  # after the ramp


def test_a_run_can_be_certified(trained, capsys):
    assert run(trained, command="test") == 0
    assert "verified %" in capsys.readouterr().out
    report = json.loads((trained / "test.json").read_text())
    assert report["meta"]["samples"] == 30
    assert report["meta"]["dtype"] == "float64"
    assert report["meta"]["attack"]["steps"] == 3
    assert "| 30, test |" in (trained / "README.md").read_text()
    assert run(trained, command="validate") == 0
    assert json.loads((trained / "validate.json").read_text())["meta"]["samples"] == 20


def test_the_network_exports_to_the_same_certificates(trained):
    x, y = lirpa_ext.data.load_digits("test")
    reports = [
        lirpa_ext.certify(
            model, (x[:40], y[:40]), 0.05, method="bcp", x_L=0.0, x_U=1.0, attack=None, radius=False, progress=False
        )
        for model in (load_model(trained / "model.pt"), lirpa_ext.load_onnx(trained / "model.onnx"))
    ]
    first, second = (
        [(record["levels"][0]["status"], record["levels"][0]["verified_margin"]) for record in report.records]
        for report in reports
    )
    assert [status for status, _ in first] == [status for status, _ in second]
    assert "certified" in [status for status, _ in first]
    np.testing.assert_allclose([m for _, m in first], [m for _, m in second], rtol=1e-9, atol=1e-9)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "loss", ["sparse-slope", pytest.param("pgd", marks=pytest.mark.slow), pytest.param("bcp", marks=pytest.mark.slow)]
)
def test_what_a_step_draws_is_drawn_again_after_a_kill(trained, tmp_path, monkeypatch, loss):
    arguments = ["--model.loss.name", loss, "--checkpoint_every", "2"]
    whole = trained
    if loss != "bcp":
        whole = tmp_path / "whole"
        assert run(whole, *arguments) == 0
    from lirpa_ext.training.module import CertifiedClassifier

    original = CertifiedClassifier.training_step

    def dying(self, batch, batch_idx):
        if self.global_step == 9:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CertifiedClassifier, "training_step", dying)
    with pytest.raises(Killed):
        run(tmp_path / "part", *arguments)
    monkeypatch.setattr(CertifiedClassifier, "training_step", original)
    assert checkpoint(tmp_path / "part")["global_step"] == 8
    assert run(tmp_path / "part", *arguments) == 0
    assert_same_weights(checkpoint(tmp_path / "part"), checkpoint(whole))
    assert rows(tmp_path / "part") == rows(whole)
    assert_same_weights(checkpoint(tmp_path / "part", "best.ckpt"), checkpoint(whole, "best.ckpt"))


def test_a_finished_run_is_not_trained_again(trained):
    before = checkpoint(trained)
    assert run(trained) == 0
    assert_same_weights(checkpoint(trained), before)
    assert len(rows(trained)) == 3


def test_a_run_of_a_version_that_had_fewer_keys_goes_on(trained, tmp_path, capsys):
    import yaml

    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del written["model"]["optimizer"]["std_factor"], written["model"]["schedule"]["graddiv_ramp"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert run(tmp_path) == 0
    assert_same_weights(checkpoint(tmp_path), checkpoint(trained))
    written["model"]["optimizer"]["lr"] *= 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert run(tmp_path) == 2
    assert "they differ in model.optimizer.lr." in capsys.readouterr().err
    written["model"]["optimizer"]["gone"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert run(tmp_path) == 2
    assert "model.optimizer.gone" in capsys.readouterr().err


def test_another_seed_is_another_run(trained, tmp_path):
    assert run(tmp_path, "--seed", "1", "--trainer.max_epochs", "2") == 0
    a, b = checkpoint(tmp_path)["state_dict"], checkpoint(trained)["state_dict"]
    assert not torch.equal(a["model.0.weight"], b["model.0.weight"])


def test_two_processes_train_as_one_with_the_joint_batch(trained, tmp_path):
    command = [
        sys.executable, "-m", "lirpa_ext.cli", "fit", *QUICK, "--run", str(tmp_path), "--trainer.devices", "2",
        "--trainer.strategy", "ddp",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 2
    assert_same_weights(checkpoint(tmp_path), checkpoint(trained), atol=1e-5)
    for one, two in zip(rows(trained), rows(tmp_path), strict=True):
        assert one["step"] == two["step"]
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-5)


def test_a_sweep_is_a_table_and_resumes(tmp_path, capsys, monkeypatch):
    command = ["sweep", "--eps", "0.3,0.5", "--losses", "bcp,natural", "--out", str(tmp_path), "--", *QUICK]
    short = ["--trainer.max_epochs", "2", "--model.schedule.ramp", "0.5"]
    assert main([*command, *short]) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["loss"], row["eps"]) for row in table] == [
        ("bcp", "0.3"), ("bcp", "0.5"), ("natural", "0.3"), ("natural", "0.5"),
    ]  # fmt: skip
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    for row in table:
        report = json.loads((tmp_path / row["run"] / "test.json").read_text())
        assert report["meta"]["eps"] == [0.5]  # what is evaluated stays
        assert float(row["verified"]) <= float(row["pgd"]) <= float(row["clean"])
    (tmp_path / table[0]["run"] / "test.json").unlink()  # as if killed before its test
    from lirpa_ext.training.module import CertifiedClassifier

    monkeypatch.setattr(CertifiedClassifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    assert main([*command, *short]) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(pytest.fail.Exception, match="a step was taken"):  # a longer training is no finished one
        main([*command, "--trainer.max_epochs", "3", "--model.schedule.ramp", "0.5"])
    capsys.readouterr()
    assert main([*command, *short, "--model.evaluation.final_attack_steps", "4"]) == 2
    assert "they differ in model.evaluation.final_attack_steps" in capsys.readouterr().err


def test_a_sweep_without_a_grid_is_refused(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path), "--", *QUICK]) == 2
    assert "a sweep varies something" in capsys.readouterr().err
    assert main(["sweep", "--losses", "bcpp", "--out", str(tmp_path), "--", *QUICK]) == 2
    assert "unknown loss 'bcpp'" in capsys.readouterr().err


def test_a_users_own_data_and_network(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningDataModule\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "class Data(LightningDataModule):\n"
        "    def __init__(self, count: int = 8):\n"
        "        super().__init__()\n"
        "        self.data = TensorDataset(torch.rand(count, 1, 4, 4), torch.arange(count) % 3)\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader(self.data, batch_size=4)\n"
        "    val_dataloader = test_dataloader = train_dataloader\n"
        "def network():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "model: {network: {name: 'mine:network', input_shape: [1, 4, 4], classes: 3}, loss: {name: bcp}, eps: 0.1}\n"
        "data: {class_path: mine.Data, init_args: {count: 12}}\n"
        "trainer: {max_epochs: 2, logger: false, accelerator: cpu}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = ["--config", str(tmp_path / "mine.yaml"), "--run", str(tmp_path / "run"), "--progress", "false"]
    assert main(["fit", *common]) == 0
    assert main(["test", *common]) == 0
    assert load_model(tmp_path / "run" / "model.pt", "mine:network")(torch.zeros(1, 1, 4, 4)).shape == (1, 3)


# --- configurations ---


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "configs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configurations_are_those_of_the_tables():
    for path, text in generator().texts().items():
        assert path.read_text(encoding="utf-8") == text, "run: python configs/generate.py"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_takes_two_steps(path, tmp_path):
    """On random images of the right shape, at the full eps in the second step."""
    import yaml

    config = yaml.safe_load(path.read_text())["model"]
    shape, classes = config["network"]["input_shape"], config["network"].get("classes", 10)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((6, *shape), np.float32), y=np.arange(6) % classes)
    arguments = [
        "--config", str(path), "--run", str(tmp_path / "run"), "--data.source", str(tmp_path / "x.npz"),
        "--data.batch_size", "2", "--data.validation", "1", "--trainer.max_epochs", "1", "--model.schedule.warmup", "0",
        "--model.schedule.ramp", "0.5", "--model.evaluation.attack_steps", "1", "--trainer.limit_train_batches", "2",
        "--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.accelerator", "cpu", "--progress",
        "false",
    ]  # fmt: skip
    assert main(["fit", *arguments]) == 0
    assert checkpoint(tmp_path / "run")["global_step"] == 2
    (row,) = rows(tmp_path / "run")
    assert math.isfinite(float(row["loss"]))


@pytest.mark.reproduction
def test_the_bcp_reference_run_verifies_what_the_official_code_does(shared, tmp_path):
    """First 12,000 MNIST images, 8 epochs, l2 1.58: the official code has 29.7% of the first 1000 test images."""
    arguments = [
        "--config", str(ROOT / "configs" / "mnist_bcp_reference.yaml"), "--data.source", str(shared / "data" / "mnist"),
        "--run", str(tmp_path), "--model.evaluation.attack_steps", "0", "--model.evaluation.final_attack_steps", "20",
        "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
    ]  # fmt: skip
    assert main(["fit", *arguments]) == 0
    assert main(["test", *arguments]) == 0
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["meta"]["samples"] == 1000
    assert report["meta"]["options"] == {"tighten": True}  # and sound norms, which are the default
    (row,) = report["summary"]
    assert row["error"] == 0
    assert 0.297 <= row["verified"] <= row["pgd"] <= row["clean"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.lose.name", "bcp"], "lose"),
        (["--model.loss.name", "bcpp"], "known are natural, pgd, lipschitz, bcp"),
        (["--model.loss.options", "{tight: true}"], "has no option 'tight'"),
        (["--model.network.name", "5C3F"], "known are 4C3F"),
        (["--model.network.name", "Large"], "too small"),
        (["--model.network.classes", "4"], "a label 9"),
        (["--model.network.input_shape", "[1, 9, 9]"], r"images have shape \(1, 8, 8\)"),
        (["--model.schedule.ramp", "3"], "Raise trainer.max_epochs"),
        (["--model.schedule.kappa", "[1, 2]"], r"both in \[0, 1\]"),
        (["--model.schedule.eps_start", "0.6"], "between 0 and eps"),
        (["--model.eps", "8", "--model.norm", "inf"], "write 8/255"),
        (["--model.eps", "36/0"], "must be a number or a fraction"),
        (["--model.eps", "nan"], "must be 0 or more"),
        (["--model.data_range", "[0, 0.5]"], "pixels span"),
        (["--model.optimizer.name", "adamw"], "known are adam and sgd"),
        (["--model.initialization", "xavier"], "known are default and ibp"),
        (["--data.source", "/nowhere/mnist"], "there is no ./nowhere/mnist.: give digits"),
        (["--data.augmentation", "cutout"], "known are none"),
        (["--data.batch_size", "241"], "between 1 and 240"),
        (["--data.batch_sise", "2"], "batch_sise"),
        (["--trainer.max_epoch", "2"], "max_epoch"),
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml"),
        (["--model.loss.fused", "true"], "cannot be fused"),
        (["--trainer.accelerator", "tpu"], "trainer: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_configurations_fail_before_the_first_step(tmp_path, capsys, monkeypatch, arguments, told):
    from lirpa_ext.training.module import CertifiedClassifier

    monkeypatch.setattr(CertifiedClassifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    assert run(tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lirpa-ext: error: ")
    assert re.search(told, error), error


def test_a_folder_of_another_run_is_not_overwritten(trained, capsys):
    before = (trained / "last.ckpt").read_bytes()
    assert run(trained, "--model.eps", "0.4") == 2
    assert "they differ in model.eps" in capsys.readouterr().err
    assert (trained / "last.ckpt").read_bytes() == before


def test_a_checkpoint_of_another_network_is_refused(trained, capsys):
    arguments = ["--model.network.mean", "[0.5]", "--checkpoint", str(trained / "best.ckpt")]
    assert run(trained, *arguments, command="test") == 2
    assert "mean is None there, [0.5] here" in capsys.readouterr().err
    assert run(trained, "--checkpoint", str(trained / "config.yaml"), command="test") == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_the_package_needs_no_lightning_and_says_what_to_install(tmp_path):
    """In a process where neither can be imported."""
    script = (
        "import sys; sys.modules['lightning'] = sys.modules['jsonargparse'] = None\n"
        "import lirpa_ext, lirpa_ext.training, lirpa_ext.models.loading\n"
        "from lirpa_ext.cli import main\n"
        "sys.exit(main(['fit', '--config', 'x.yaml']))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install lightning" in done.stderr


def test_errors_are_the_packages_own():
    assert issubclass(ConfigError, lirpa_ext.errors.LirpaExtError)
    assert not issubclass(ConfigError, DataError)
