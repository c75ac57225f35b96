"""Evaluation and studies of randomized models: numbers that are known beforehand, seeds, files, pictures, commands."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from lirpa_ext.analysis.studies import (
    accuracy_study,
    concentration_record,
    concentrations,
    cosine_matrix,
    gradient_scatter,
    loss_increase,
    plot_accuracy,
    plot_concentrations,
    plot_cosines,
    plot_loss_increase,
    plot_scatter,
    plot_transfer,
    transfer_matrix,
)
from lirpa_ext.attacks import EOT, FGSM, PGD, Attack
from lirpa_ext.certification import evaluate
from lirpa_ext.certification.robust_accuracy import source_attack, wilson
from lirpa_ext.cli import main
from lirpa_ext.errors import InvalidInputError
from lirpa_ext.randomized import RandomLayer, make_adv_bnn
from lirpa_ext.reporting.plots import alt_text, figure, save

ROOT = Path(__file__).resolve().parents[2]


class Pick(RandomLayer):
    """Two logits (w.x, 0), with w drawn from a list: gradients of class 0 point along -w."""

    def __init__(self, *weights):
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))

    def draw(self, generator):
        return int(torch.randint(len(self.weights), (), generator=generator))

    def held(self, x, draws):
        parts = zip(x.flatten(1).chunk(len(draws)), draws, strict=True)
        margin = torch.cat([part @ self.weights[draw] for part, draw in parts])
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


@pytest.fixture
def batch():
    return torch.rand(12, 1, 3, 3, dtype=torch.float64), torch.arange(12) % 4


@pytest.fixture
def models():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    return {"narrow": make_adv_bnn(net, 0.02), "wide": make_adv_bnn(net, 0.5)}


# --- evaluation ---


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (8, 10), (433, 500), (1, 1)])
def test_wilson_is_scipys(successes, trials, confidence):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    found = wilson(successes, trials, confidence)
    assert found.value == successes / trials
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_contains_its_own_value():
    for trials in range(1, 400):
        for found in (wilson(0, trials), wilson(trials, trials), wilson(trials / 3, trials)):
            assert 0 <= found.lower <= found.value <= found.upper <= 1


def test_wilson_refuses_what_is_no_share():
    for arguments in ((1, 0), (3, 2), (-1, 2), (1, 2, 1.0)):
        with pytest.raises(InvalidInputError):
            wilson(*arguments)


def test_accuracy_of_a_linear_model_is_known_at_every_eps():
    """Its l-infinity robust radius is margin / ||w_y - w_j||_1."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    rows = model.weight[y] - model.weight[1 - y]
    radius = (functional.linear(x, model.weight, model.bias).amax(1) - model(x).amin(1)) / rows.abs().sum(1)
    eps = [0.0, 0.1, 0.3, 1.0]
    found = evaluate(model, (x, y), eps, FGSM("margin"), x_L=None, x_U=None, batch_size=64)
    expected = [float((radius > level).double().mean()) for level in eps]
    assert [level.ensemble.value for level in found.levels] == pytest.approx(expected)
    assert [level.single.value for level in found.levels] == pytest.approx(expected)
    assert all(level.spread == 0 for level in found.levels)
    assert found.draws == 1 and found.samples == 200


def test_judges_are_draws_that_the_attack_has_not_seen():
    """Networks that are right or wrong by chance, whatever the image: no attack changes how many are right."""
    chance = nn.Sequential(Pick(*[[1.0, 1.0]] * 7, *[[-1.0, -1.0]] * 3))
    x, y = torch.rand(30, 2, dtype=torch.float64) / 2 + 0.4, torch.zeros(30, dtype=torch.long)
    found = evaluate(chance, (x, y), [0.05], EOT(PGD(8), 3), draws=400, batch_size=10, seed=1).levels[0]
    assert found.single.value == pytest.approx(0.7, abs=0.04)
    assert found.single.lower < found.single.value < found.single.upper
    assert found.spread == pytest.approx(math.sqrt(0.7 * 0.3 / 3), abs=0.03)  # 3 batches have draws of their own
    assert found.ensemble.value == 1


def test_votes_and_probabilities_differ_where_they_should():
    """One network in three is very sure of class 1: it wins the mean probability, and loses the vote."""
    model = nn.Sequential(Pick([0.5], [0.5], [-50.0]))
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    accuracy = {
        by: evaluate(model, (x, y), 0.0, draws=300, by=by).levels[0].ensemble.value for by in ("probability", "vote")
    }
    assert accuracy == {"probability": 0.0, "vote": 1.0}


def test_ties_and_nan_are_not_right():
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for weight in (0.0, math.nan):
        level = evaluate(nn.Sequential(Pick([weight])), (x, y), 0.0, draws=3).levels[0]
        assert level.single.value == level.ensemble.value == 0


def test_evaluation_reproduces_and_grows_worse_with_eps(batch, models):
    x, y = batch
    y = models["narrow"](x).argmax(1)
    runs = [evaluate(models["narrow"], (x, y), [0.0, 0.1, 0.4], draws=5, seed=seed) for seed in (3, 3)]
    assert runs[0] == runs[1]
    values = [level.ensemble.value for level in runs[0].levels]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]
    assert "20 draws" not in runs[0].attack and "draws=20" in runs[0].attack  # EOT-PGD of the source
    assert set(runs[0].rows()[0]) >= {"eps", "single", "single_lower", "ensemble_upper", "spread"}


def test_evaluation_refuses(batch, models):
    for options in ({"draws": 0}, {"confidence": 1.0}, {"batch_size": 0}, {"eps": []}, {"eps": [-0.1]}, {"by": "mean"}):
        with pytest.raises(InvalidInputError):
            evaluate(models["wide"], batch, **({"eps": 0.1} | options))
    with pytest.raises(InvalidInputError, match="data range"):
        evaluate(models["wide"], (batch[0] + 3, batch[1]), 0.1)


# --- gradients ---


def test_scatter_of_identical_and_of_opposite_gradients():
    x, y = torch.rand(4, dtype=torch.float64), torch.tensor(0)
    same = nn.Sequential(Pick([1.0, 2.0, 0.0, 2.0]))
    opposite = nn.Sequential(Pick([1.0, 2.0, 0.0, 2.0], [-1.0, -2.0, 0.0, -2.0]))
    found = gradient_scatter({"same": same, "opposite": opposite}, x, y, draws=50)
    assert found.lengths["same"] == pytest.approx(1)
    assert torch.tensor(found.points["same"]).allclose(torch.tensor([[1.0, 0.0]]).expand(50, 2))
    signs = torch.tensor(found.points["opposite"])[:, 0]
    assert signs.abs().allclose(torch.ones(50)) and 0 < (signs > 0).sum() < 50
    assert found.lengths["opposite"] == pytest.approx(float(signs.mean().abs()), abs=1e-6)


def test_scatter_keeps_the_lengths_of_two_means_and_shortens_the_rest(batch, models):
    x, y = batch
    found = gradient_scatter(models, x[0], y[0], draws=40)
    for name, (a, b) in found.means.items():
        assert math.hypot(a, b) == pytest.approx(found.lengths[name], abs=1e-9)
        assert all(math.hypot(*point) <= 1 + 1e-9 for point in found.points[name])
    assert found.lengths["wide"] < found.lengths["narrow"]
    alone = gradient_scatter({"wide": models["wide"]}, x[0], y[0], draws=40)
    assert alone.lengths["wide"] == found.lengths["wide"]
    assert torch.tensor(alone.points["wide"])[:, 1].std() > 0.05  # the second axis is where they vary


def test_cosines_of_known_gradients():
    x, y = torch.rand(3, dtype=torch.float64), torch.tensor(0)
    model = nn.Sequential(Pick([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]))
    matrix = torch.tensor(cosine_matrix({"model": model}, x, y, draws=30).cosines["model"])
    assert matrix.diagonal().allclose(torch.ones(30))
    assert matrix.allclose(matrix.T)
    assert sorted(set(matrix.round(decimals=6).flatten().tolist())) == [-1, 0, 1]


def test_concentrations_are_those_of_the_regularizers(batch, models):
    """kappa = rho (d - rho) / (1 - rho^2), sample by sample, and in batches the same."""
    x, y = batch
    found = concentrations(models, x, y, draws=200)
    for name, form in itertools.product(models, ("printed", "banerjee")):
        for rho, kappa in zip(found.rho[name], getattr(found, form)[name], strict=True):
            expected = rho * (9 - (rho if form == "printed" else rho**2)) / (1 - rho**2)
            assert kappa == pytest.approx(expected, rel=1e-6)
    assert found.rows()[1]["median_printed"] < found.rows()[0]["median_printed"]
    assert len(found.details()) == 24


def test_concentration_record_is_the_mean_over_samples(batch, models):
    x, y = batch
    record = concentration_record(models["wide"], x, y, 20, torch.Generator().manual_seed(0))
    assert set(record) == {"kappa", "cosine", "dpp", "rho"}
    rho, cosine = record["rho"], record["cosine"]
    assert 0 < rho < 1 and record["dpp"] > 0
    # ||mean||^2 = (1 + (n - 1) mean cosine) / n for each sample; the mean of squares is at least the square of the mean
    assert (1 + 19 * cosine) / 20 >= rho**2 - 1e-9


# --- robustness ---


def test_loss_increase_of_a_linear_model_is_known():
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 2
    found = loss_increase({"linear": model}, (x, y), 0.2, EOT(FGSM(), 7), x_L=None, x_U=None, batch_size=6)
    rows = model.weight[y] - model.weight[1 - y]
    margin = model(x).gather(1, y[:, None])[:, 0] - model(x).gather(1, 1 - y[:, None])[:, 0]
    expected = functional.softplus(0.2 * rows.abs().sum(1) - margin) - functional.softplus(-margin)
    assert found.increase["linear"] == pytest.approx(expected.tolist())
    assert found.rows()[0]["increase"] == pytest.approx(float(expected.mean()))


def test_transfer_within_one_network_is_its_own_accuracy(batch):
    """A model whose draws are all the same: each row is the accuracy under PGD, in every column."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    x, _ = batch
    y = net(x).argmax(1)
    attack = PGD(5, random_start=False)
    found = transfer_matrix({"same": make_adv_bnn(net, 1.0, init_std=1e-12)}, (x, y), 0.1, 3, attack, batch_size=5)
    accuracy = evaluate(net, (x, y), 0.1, attack).levels[0].ensemble.value
    assert 0 < accuracy < 1
    assert found.accuracy["same"] == [[pytest.approx(accuracy)] * 3] * 3


def test_transfer_is_weaker_between_networks_that_differ(batch, models):
    x, _ = batch
    y = models["narrow"](x).argmax(1)
    found = transfer_matrix(models, (x, y), 0.1, 6)
    for name, row in zip(models, found.rows(), strict=True):
        assert row["min"] <= row["others"] <= row["max"]
        assert row["own"] <= row["others"], name
    gap = {row["model"]: row["others"] - row["own"] for row in found.rows()}
    assert gap["wide"] > gap["narrow"]


def test_accuracy_study_has_a_line_for_each_model_and_n(batch, models):
    x, _ = batch
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    data = x, net(x).argmax(1)
    found = accuracy_study(models | {"none": net}, data, [0.0, 0.1, 0.3], (2, 5), PGD(3), ensemble=4)
    assert list(found.found) == [("narrow", 2), ("narrow", 5), ("wide", 2), ("wide", 5), ("none", 1)]
    expected = evaluate(models["wide"], data, [0.0, 0.1, 0.3], EOT(PGD(3), 5), draws=4)
    assert found.found["wide", 5] == expected
    lines = found.table().splitlines()
    assert len(lines) == 6 and lines[0].split() == ["model", "n", "eps", "0", "eps", "0.1", "eps", "0.3"]
    assert len(found.rows()) == 15
    _, axes = figure("accuracy")
    plot_accuracy(found, axes[0, 0])
    assert axes[0, 0].get_legend().get_texts()[0].get_text() == "narrow, n = 2"
    _, axes = figure("accuracy")
    plot_accuracy(found, axes[0, 0], over="draws")
    line = axes[0, 0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [2, 5]
    with pytest.raises(InvalidInputError, match="over"):
        plot_accuracy(found, axes[0, 0], over="n")


def test_the_sources_attack():
    attack = source_attack()
    assert vars(attack) == {
        "steps": 20, "restarts": 1, "loss": "cross-entropy", "random_start": False, "step_size": 0.25,
        "momentum": 0.0,
    }  # fmt: skip


STUDIES = {
    "scatter": (lambda models, x, y: gradient_scatter(models, x[0], y[0], 10), plot_scatter),
    "cosines": (lambda models, x, y: cosine_matrix(models, x[0], y[0], 6), plot_cosines),
    "kappa": (lambda models, x, y: concentrations(models, x, y, 5), plot_concentrations),
    "loss-increase": (lambda models, x, y: loss_increase(models, (x, y), 0.1, draws=2), plot_loss_increase),
    "transfer": (lambda models, x, y: transfer_matrix(models, (x, y), 0.1, 3), plot_transfer),
    "accuracy": (lambda models, x, y: accuracy_study(models, (x, y), [0.1, 0.2], (2,)), plot_accuracy),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_reproduces_writes_its_numbers_and_draws_them(name, batch, models, tmp_path):
    study, plot = STUDIES[name]
    before = torch.get_rng_state()
    result, again = study(models, *batch), study(models, *batch)
    assert result == again
    assert torch.equal(before, torch.get_rng_state())
    result.save(tmp_path / name)
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert content["rows"] == json.loads(json.dumps(result.rows()))
    with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(result.rows())
    for row in [*result.rows(), *result.details()]:
        assert all(not isinstance(value, float) or math.isfinite(value) for value in row.values()), row
    drawn, axes = figure(result.summary())
    plot(result, axes[0, 0])
    assert axes[0, 0].has_data() and axes[0, 0].get_xlabel()
    save(drawn, tmp_path / f"{name}.png")
    assert alt_text(drawn) and (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", STUDIES)
def test_no_model_is_an_error(name, batch):
    with pytest.raises(InvalidInputError, match="at least one model"):
        STUDIES[name][0]({}, *batch)


@pytest.mark.parametrize("name", ["scatter", "cosines", "kappa", "transfer"])
def test_a_model_that_draws_nothing_is_an_error(name, batch):
    with pytest.raises(InvalidInputError, match="randomized"):
        STUDIES[name][0]({"plain": nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()}, *batch)


def test_too_few_draws_are_an_error(batch, models):
    x, y = batch
    for study in (
        lambda: gradient_scatter(models, x[0], y[0], 1), lambda: cosine_matrix(models, x[0], y[0], 1),
        lambda: concentrations(models, x, y, 1), lambda: transfer_matrix(models, batch, 0.1, 1),
        lambda: loss_increase(models, batch, 0.1, draws=0), lambda: accuracy_study(models, batch, [0.1], ()),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            study()


# --- commands ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two randomized networks for digits, pickled whole."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    for name, std in (("narrow", 0.01), ("wide", 0.3)):
        torch.save(make_adv_bnn(net, std), folder / f"{name}.pt")
    return [str(folder / f"{name}.pt") for name in ("narrow", "wide")]


COMMANDS = {
    "scatter": ["--draws", "10", "--sample", "2"],
    "cosines": ["--draws", "10"],
    "kappa": ["--draws", "10"],
    "loss-increase": ["--eps", "0.1", "--steps", "2", "--attack-draws", "3"],
    "accuracy": ["--eps", "0.1,0.2", "--steps", "2", "--attack-draws", "2,3", "--over", "draws", "--norm", "inf"],
    "transfer": ["--eps", "0.1", "--networks", "3", "--attack", "fgsm"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, saved, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = ["--data", "digits", "--limit", "8", "--trust", "--out", str(tmp_path)]
    assert main(["study", name, *saved, *options, *COMMANDS[name]]) == 0
    printed = capsys.readouterr().out
    assert "narrow" in printed and "wide" in printed
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {row["model"] for row in content["rows"]} == {"narrow", "wide"}
    assert (tmp_path / f"{name}.png").is_file()


def test_command_says_what_is_wrong(saved, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = [*saved, "--data", "digits", "--limit", "4", "--trust"]
    for arguments, message in (
        (["scatter", *options, "--sample", "4"], "--sample 4 is none of the 4 samples"),
        (["loss-increase", *options, "--eps", "0.1", "--attack-draws", "2,3"], "one --attack-draws"),
        (["transfer", *options, "--eps", "0.1,0.2"], "one --eps"),
        (["concentration", str(tmp_path)], "GradientConcentration"),
    ):
        assert main(["study", *arguments]) == 2
        assert message in capsys.readouterr().err


# Adv-BNN on few digits, for seconds; the callback records after each epoch.
FIT = [
    "--config", str(ROOT / "configs" / "digits_adv-bnn_graddiv.yaml"), "--data.limit", "160", "--data.validation", "20",
    "--data.batch_size", "70", "--trainer.max_epochs", "3", "--model.schedule.warmup", "0.5", "--model.schedule.ramp",
    "1", "--model.loss.attack_steps", "1", "--model.evaluation.attack_steps", "1", "--model.evaluation.draws", "2",
    "--model.optimizer.decay.milestones", "[]", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    "--progress", "false",
]  # fmt: skip
RECORD = ["--trainer.callbacks+", "lirpa_ext.analysis.studies.GradientConcentration", "--trainer.callbacks.draws", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with the callback."""
    for name in ("lightning", "jsonargparse", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    folder = tmp_path_factory.mktemp("runs") / "graddiv"
    assert main(["fit", *FIT, *RECORD, "--run", str(folder)]) == 0
    return folder


def test_concentration_is_recorded_in_training_and_changes_nothing(run, tmp_path):
    content = json.loads((run / "concentration.json").read_text(encoding="utf-8"))
    assert [row["epoch"] for row in content["rows"]] == [0, 1, 2, 3]
    assert all(0 <= row["rho"] <= 1 and row["dpp"] >= 0 for row in content["rows"])
    assert (run / "concentration.png").is_file()
    assert main(["fit", *FIT, "--run", str(tmp_path)]) == 0
    weights, others = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, tmp_path))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_runs_are_studied_by_their_folders(run, tmp_path, capsys):
    assert main(["study", "concentration", str(run), str(run), "--out", str(tmp_path)]) == 0
    assert main(["study", "scatter", str(run), "--draws", "5", "--out", str(tmp_path)]) == 0
    assert main(["study", "accuracy", str(run), "--limit", "4", "--steps", "1", "--attack-draws", "2"]) == 0
    printed = capsys.readouterr().out
    assert "rho" in printed and "linf balls" in printed and "eps 0.2" in printed  # norm and eps of the run
    few = ["--limit", "4", "--steps", "2", "--attack-draws", "2", "--random-start", "--momentum", "1"]
    assert main(["study", "accuracy", str(run), *few, "--out", str(tmp_path)]) == 0
    written = (tmp_path / "accuracy.json").read_text(encoding="utf-8")
    assert "random_start=True" in written and "momentum=1.0" in written
    assert {path.name for path in tmp_path.iterdir()} >= {"concentration.png", "scatter.json", "scatter.png"}


def test_the_callback_refuses(tmp_path, capsys):
    for name in ("lightning", "jsonargparse", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from lirpa_ext.analysis.studies import GradientConcentration
    from lirpa_ext.errors import ConfigError

    for options in ({"draws": 1}, {"samples": 0}):
        with pytest.raises(ConfigError):
            GradientConcentration(**options)
    config = str(ROOT / "configs" / "digits_bcp.yaml")
    assert main(["fit", "--config", config, *RECORD, "--run", str(tmp_path), "--trainer.logger", "false"]) == 2
    assert "draws nothing" in capsys.readouterr().err


def test_an_attack_of_ones_own_is_studied(batch, models):
    class Shift(Attack):
        def run(self, target):
            target.score(target.project(target.x + 1))

    found = accuracy_study({"wide": models["wide"]}, batch, [0.1], (3,), Shift(), ensemble=2)
    assert "Shift()" in found.summary()
