"""Randomized networks: draws that are held, RSE, Adv-BNN, layers of other packages, prediction, training."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as distribution_kl
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lirpa_ext.randomized.sampling
from lirpa_ext.attacks import EOT, PGD
from lirpa_ext.cli import main
from lirpa_ext.domain.perturbation import PerturbationLpNorm
from lirpa_ext.errors import ConfigError, InvalidInputError, TraceError
from lirpa_ext.models.loading import load_model
from lirpa_ext.randomized import (
    BayesianLayer,
    Noise,
    RandomLayer,
    elbo_loss,
    gradients,
    is_randomized,
    kl_divergence,
    make_adv_bnn,
    make_rse,
    predict,
    require_randomized,
    sample,
)
from lirpa_ext.randomized.graddiv import mean_cosine
from lirpa_ext.training import Loss, Network, build
from lirpa_ext.training.randomized import randomized_loss
from lirpa_ext.training.schedules import Values

ROOT = Path(__file__).resolve().parents[2]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


class Shifted(RandomLayer):
    """The smallest layer of an outsider's: one number for the whole input."""

    def draw(self, generator):
        return torch.randn((), generator=generator)

    def held(self, x, draws):
        return (x.unflatten(0, (len(draws), -1)) + torch.stack(draws).view(-1, *[1] * x.dim())).flatten(0, 1)


def torchbnn_net() -> nn.Module:
    torchbnn = pytest.importorskip("torchbnn", reason="pip install torchbnn")
    return nn.Sequential(
        torchbnn.BayesConv2d(prior_mu=0, prior_sigma=0.1, in_channels=1, out_channels=4, kernel_size=3),
        torchbnn.BayesBatchNorm2d(prior_mu=0, prior_sigma=0.1, num_features=4), nn.ReLU(), nn.Flatten(),
        torchbnn.BayesLinear(prior_mu=0, prior_sigma=0.1, in_features=144, out_features=5),
    )  # fmt: skip


class First(nn.Module):
    """Leaves a KL divergence behind, as networks of bayesian-torch do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def bayesian_torch_net() -> nn.Module:
    layers = pytest.importorskip("bayesian_torch.layers", reason="pip install --no-deps bayesian-torch")
    return nn.Sequential(
        First(layers.Conv2dReparameterization(1, 4, 3)), nn.ReLU(), nn.Flatten(),
        First(layers.LinearReparameterization(144, 5)),
    )  # fmt: skip


MAKERS = {
    "rse": lambda: make_rse(network()).eval(),
    "adv-bnn": lambda: make_adv_bnn(network()).eval(),
    "rse of an adv-bnn": lambda: make_rse(make_adv_bnn(network())).eval(),
    "own layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Shifted()),
    "dropout": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(), nn.Linear(144, 5)
    ),
    "torchbnn": lambda: torchbnn_net().eval(),
    "bayesian-torch": bayesian_torch_net,
}  # fmt: skip


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]()


@pytest.fixture
def x():
    return torch.rand(6, 1, 8, 8)


# --- draws ---


def test_a_draw_is_held(model, x):
    drawn = sample(model, generator(1))
    first = drawn(x)
    assert not torch.equal(model(x), model(x))  # which the model itself does not
    assert torch.equal(drawn(x), first)
    assert is_randomized(model)
    assert not is_randomized(drawn)
    assert not is_randomized(nn.Sequential(drawn, nn.ReLU()))


def test_a_draw_is_a_function_of_the_generator(model, x):
    first, source = sample(model, generator(1))(x), generator(1)
    torch.rand(3)  # of torch's own generator, which counts for nothing
    assert torch.equal(sample(model, source)(x), first)
    assert not torch.allclose(sample(model, source)(x), first)


def test_a_held_draw_leaves_torchs_generator_alone(model, x):
    drawn, before = sample(model, generator(1)), torch.get_rng_state()
    drawn(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_the_same_together_and_one_by_one(model, x):
    source = generator(4)
    alone = torch.stack([sample(model, source)(x) for _ in range(3)])
    together = sample(model, generator(4), 3)
    torch.testing.assert_close(together.each(x), alone)
    torch.testing.assert_close(together(x.repeat(3, 1, 1, 1)), alone.flatten(0, 1))


@pytest.mark.parametrize("name", ["rse", "adv-bnn", "own layer", "torchbnn"])
def test_a_sample_meets_the_same_network_in_a_smaller_and_a_larger_batch(name, x):
    model = MAKERS[name]()
    drawn = sample(model, generator(1))
    small = drawn(x[:2])
    torch.testing.assert_close(drawn(x)[:2], small)
    torch.testing.assert_close(sample(model, generator(1))(x)[:2], small)  # whichever batch came first


def test_gradients_reach_weights_and_inputs(model, x):
    """Those of the held function, by central differences in float64."""
    model, x = model.double(), x.double()
    drawn = sample(model, generator(1))
    assert {id(p) for p in drawn.parameters()} == {id(p) for p in model.parameters()}
    weight = max((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    towards, direction = torch.randn_like(x), torch.randn_like(weight)
    points = x.clone().requires_grad_()
    of_x, of_weight = torch.autograd.grad(drawn(points).square().sum(), [points, weight])
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(drawn(x + sign * step * towards).square().sum())
            weight -= sign * step * direction
    slope = (of_x * towards).sum() + (of_weight * direction).sum()
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-4, atol=1e-4)


def test_a_draw_on_the_way_does_not_change_what_backward_needs(model, x):
    """Layers of other packages overwrite their noise in place."""
    points = x.clone().requires_grad_()
    drawn = sample(model, generator(1))
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(drawn(points).square().sum(), weights, allow_unused=True)
    value = drawn(points).square().sum()
    sample(model, generator(2))(x)
    torch.testing.assert_close(torch.autograd.grad(value, weights, allow_unused=True), expected)


def test_the_model_draws_again_after_an_error():
    model = nn.Sequential(make_adv_bnn(nn.Linear(3, 4)), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        sample(model, generator())(torch.rand(2, 3))
    assert "forward" not in model[0].__dict__
    assert not torch.equal(model[0](torch.ones(2, 3)), model[0](torch.ones(2, 3)))


def test_modes_decide_whether_dropout_draws(x):
    model = MAKERS["dropout"]()
    assert is_randomized(model)
    assert not is_randomized(model.eval())


def test_a_deterministic_model_is_its_only_draw(x):
    model = network().eval()
    assert torch.equal(sample(model, generator())(x), model(x))
    with pytest.raises(InvalidInputError, match=r"diversity needs a randomized network, and no layer.*make_rse"):
        require_randomized(model, "diversity")


@pytest.mark.parametrize("name", ["rse", "adv-bnn", "own layer", "torchbnn"])
def test_nothing_is_bounded_or_certified_of_a_randomized_network(name, x):
    model, y = MAKERS[name](), torch.zeros(6, dtype=torch.long)
    for made in (model, sample(model, generator())):
        with pytest.raises(TraceError, match="is a randomized network"):
            lirpa_ext.BoundedModule(made, x)
    with pytest.raises(TraceError, match="is a randomized network"):
        lirpa_ext.certify(model, (x, y), 0.01, method="bcp", progress=False)


def test_wrong_numbers_of_draws(x):
    with pytest.raises(InvalidInputError, match="draws = 0"):
        sample(make_rse(network()), generator(), 0)
    with pytest.raises(InvalidInputError, match="6 inputs cannot be shared by 4"):
        sample(make_rse(network()), generator(), 4)(x)


# --- ensembles ---


def test_predictions_are_means_over_draws(model, x):
    source = generator(6)
    logits = torch.stack([sample(model, source)(x) for _ in range(7)])
    torch.testing.assert_close(predict(model, x, 7, generator(6)), logits.softmax(2).mean(0))
    votes = functional.one_hot(logits.argmax(2), 5).float().mean(0)
    torch.testing.assert_close(predict(model, x, 7, generator(6), by="vote"), votes)


def test_predictions_do_not_depend_on_how_many_draws_go_together(x, monkeypatch):
    model = make_rse(network()).eval()
    expected = predict(model, x, 7)
    monkeypatch.setattr(lirpa_ext.randomized.sampling, "_MOST_ROWS", 13)
    torch.testing.assert_close(predict(model, x, 7), expected)


@pytest.mark.parametrize("by", ["probability", "vote"])
def test_a_nan_is_no_prediction(by, x):
    model = make_adv_bnn(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    x[1, 0, 3, 3] = math.nan
    found = predict(model, x, 5, by=by)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3, 4, 5]].sum(1), torch.ones(5))


def test_wrong_predictions(x):
    with pytest.raises(InvalidInputError, match="'probability' or 'vote'"):
        predict(make_rse(network()), x, 3, by="mean")
    with pytest.raises(InvalidInputError, match="draws = 0"):
        predict(make_rse(network()), x, 0)


# --- RSE ---


def test_noise_has_the_levels_of_the_source(x):
    """Read off in front of the convolutions: 0.2 before the first, 0.1 before the others, none elsewhere."""
    model = make_rse(network()).eval()
    seen: dict[str, list[torch.Tensor]] = {"0.1": [], "3.1": [], "6": []}
    inputs: dict[str, list[torch.Tensor]] = {"0": [], "3": []}
    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    for name in inputs:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        for _ in range(200):
            model(x)
    for name, level in (("0", 0.2), ("3", 0.1)):
        noise = torch.stack(seen[f"{name}.1"]) - torch.stack(inputs[name])
        count = noise.numel()
        assert abs(noise.mean()) < 5 * level / math.sqrt(count)
        assert noise.std() == pytest.approx(level, rel=5 / math.sqrt(2 * count))
        flat = noise.flatten(2)
        assert abs((flat[:, 0] * flat[:, 1]).mean()) < 5 * level**2 / math.sqrt(flat[:, 0].numel())  # samples differ
    assert [type(layer).__name__ for layer in model.modules()].count("Noise") == 2


def test_noise_is_added_to_the_input_of_the_layer(x):
    layer = Noise(0.3)
    first, second = layer.draw(generator(1)), layer.draw(generator(2))
    torch.testing.assert_close(layer.held(x, [first]) - x, 0.3 * first.like(x))
    torch.testing.assert_close(
        layer.held(torch.cat([x, x]), [first, second]), torch.cat([x + 0.3 * first.like(x), x + 0.3 * second.like(x)])
    )


def test_transforms_leave_the_model_as_it_is(x):
    model = network().eval()
    expected, before = model(x), str(model)
    for made in (make_rse(model, 0.2, 0.0), make_adv_bnn(model, 0.1, init_std=1e-12)):
        assert str(model) == before
        assert torch.equal(model(x), expected)
        assert not {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
    torch.testing.assert_close(made.eval()(x), expected)  # a posterior without spread
    silent = make_rse(model, 0.2, 0.0)
    assert [type(layer).__name__ for layer in silent.modules()].count("Noise") == 1


def test_a_single_layer_and_a_shared_one():
    assert isinstance(make_rse(nn.Conv2d(1, 2, 3))[0], Noise)
    assert isinstance(make_adv_bnn(nn.Linear(2, 3)), BayesianLayer)
    shared = nn.Linear(4, 4)
    made = make_adv_bnn(nn.Sequential(shared, nn.ReLU(), shared))
    assert made[0] is made[2]
    drawn, x = sample(made, generator()), torch.rand(3, 4)
    weights = drawn.model[0]._weights(drawn._held[0][2][0])
    once = functional.linear(x, weights["weight"], weights["bias"]).relu()
    torch.testing.assert_close(drawn(x), functional.linear(once, weights["weight"], weights["bias"]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: make_rse(nn.Linear(2, 3)), "has none"),
        (lambda: make_rse(network(), init=-0.1), "0 or more"),
        (lambda: make_rse(network(), inner=math.nan), "0 or more"),
        (lambda: make_rse(network(), 0.0, 0.0), "both noise levels are 0"),
        (lambda: make_adv_bnn(nn.ReLU()), "no dense or convolutional layer"),
        (lambda: make_adv_bnn(network(), prior_std=0.0), "prior_std"),
        (lambda: make_adv_bnn(network(), 0.1, init_std=math.inf), "init_std"),
        (
            lambda: make_adv_bnn(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))),
            "parametrized",
        ),
        (lambda: kl_divergence(network()), "no Bayesian layer"),
        (lambda: elbo_loss(make_adv_bnn(network()), torch.zeros(1, 5), torch.tensor([0]), 0), "samples"),
        (lambda: elbo_loss(make_adv_bnn(network()), torch.zeros(1, 5), torch.tensor([0]), 5, -1.0), "kl_factor"),
    ],
)
def test_wrong_arguments_are_refused(make, told):
    with pytest.raises(InvalidInputError, match=told):
        make()


# --- Adv-BNN ---


def test_weights_are_drawn_from_the_posterior():
    layer = BayesianLayer(nn.Linear(3, 2), prior_std=0.1, init_std=0.2)
    with torch.no_grad():
        layer.log_std["weight"][0, 1] = math.log(0.05)
    source, count = generator(1), 4000
    drawn = torch.stack([layer._weights(layer.draw(source))["weight"] for _ in range(count)])
    stds = torch.full((2, 3), 0.2)
    stds[0, 1] = 0.05
    assert ((drawn.mean(0) - layer.mean.weight).abs() < 5 * stds / math.sqrt(count)).all()
    torch.testing.assert_close(drawn.std(0), stds, rtol=5 / math.sqrt(2 * count), atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3, bias=False), (4,)),
        (nn.Conv1d(2, 4, 3, groups=2), (2, 9)),
        (nn.Conv2d(2, 3, 3, 2, 1, padding_mode="reflect"), (2, 7, 7)),
        (nn.ConvTranspose2d(2, 3, 3, 2), (2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_layer_computes_with_its_drawn_weights(layer, shape):
    """The same layer, loaded with mean + std * noise."""
    model = make_adv_bnn(layer, 0.3)
    x, source = torch.rand(5, *shape), generator(2)
    noises = [model.draw(generator(int(seed))) for seed in torch.randint(99, (3,), generator=source)]
    outputs = model.held(x.repeat(3, *[1] * len(shape)), noises).view(3, 5, *model.mean(x).shape[1:])
    for noise, output in zip(noises, outputs, strict=True):
        state = {name: p + 0.3 * noise[name] for name, p in layer.state_dict().items()}
        layer_too = type(layer).__new__(type(layer))
        layer_too.__dict__ = {**layer.__dict__, "_parameters": {"weight": None, "bias": None} | state}
        torch.testing.assert_close(output, layer_too(x))


def test_kl_is_that_of_torchs_distributions():
    model = make_adv_bnn(network(), prior_std=0.07, init_std=0.03)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = 0.0
    for layer in model.modules():
        if isinstance(layer, BayesianLayer):
            for name, mean in layer.mean.named_parameters():
                posterior = Normal(mean, layer.log_std[name].exp())
                expected = expected + distribution_kl(posterior, Normal(torch.zeros(()), 0.07)).sum()
    torch.testing.assert_close(kl_divergence(model), expected)
    prior = make_adv_bnn(nn.Linear(3, 3), prior_std=0.2)
    with torch.no_grad():
        for parameter in prior.mean.parameters():
            parameter.zero_()
    assert kl_divergence(prior).item() == pytest.approx(0.0, abs=1e-6)


def test_elbo_is_cross_entropy_and_kl_for_each_sample():
    model = make_adv_bnn(network())
    logits, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    expected = functional.cross_entropy(logits, y) + 0.02 * kl_divergence(model) / 1000
    torch.testing.assert_close(elbo_loss(model, logits, y, 1000), expected)
    torch.testing.assert_close(elbo_loss(model, logits, y, 1000, 0.0), functional.cross_entropy(logits, y))


# --- training ---

pytest.importorskip("lightning", reason="training needs Lightning")
pytest.importorskip("jsonargparse", reason="training needs jsonargparse")

QUICK = [
    "--config", str(ROOT / "configs" / "digits_adv-bnn_graddiv.yaml"), "--data.limit", "180", "--data.validation", "20",
    "--data.batch_size", "40", "--data.test_limit", "20", "--trainer.max_epochs", "2", "--model.schedule.warmup", "0.5",
    "--model.schedule.ramp", "1", "--model.loss.attack_steps", "2", "--model.evaluation.attack_steps", "2",
    "--model.evaluation.draws", "3", "--model.evaluation.attack_draws", "2", "--model.evaluation.final_attack_steps",
    "3", "--model.evaluation.final_attack_draws", "4", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    "--progress", "false",
]  # fmt: skip


def run(folder: Path, *arguments: str, command: str = "fit") -> int:
    return main([command, *QUICK, "--run", str(folder), *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert run(folder) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_standard_deviations_have_a_learning_rate_of_their_own():
    from lirpa_ext.training import CertifiedClassifier, Decay, Optimizer

    network = Network("2C2F", [1, 8, 8], randomized="adv-bnn", options={"prior_std": 0.05})
    optimizer = Optimizer(lr=0.01, std_factor=10.0, decay=Decay(milestones=[1], gamma=0.5))
    module = CertifiedClassifier(network, Loss("adv-bnn"), 0.1, math.inf, optimizer=optimizer)
    (adam,), (decay,) = module.configure_optimizers()
    sum(part.sum() for part in module.model.parameters()).backward()
    before = copy.deepcopy(dict(module.model.named_parameters()))
    adam.step()  # Adam's first step is of length lr
    for name, part in module.model.named_parameters():
        moved = torch.full_like(part, 0.1 if "log_std" in name else 0.01)
        torch.testing.assert_close(before[name] - part, moved, rtol=1e-4, atol=1e-6)
    decay.step()
    assert [group["lr"] for group in adam.param_groups] == [pytest.approx(0.005), pytest.approx(0.05)]
    with pytest.raises(ConfigError, match="only adv-bnn"):
        rse = Network("2C2F", [1, 8, 8], randomized="rse")
        CertifiedClassifier(rse, Loss("rse"), 0.1, math.inf, optimizer=optimizer)
    plain = CertifiedClassifier(network, Loss("adv-bnn"), 0.1, math.inf)
    assert len(plain.configure_optimizers()[0][0].param_groups) == 1  # as in the checkpoints of earlier versions


def test_a_run_judges_an_ensemble_and_verifies_nothing(trained):
    table = rows(trained)
    assert [float(row["graddiv"]) for row in table] == [pytest.approx(0.3 * 0.5), 0.3]
    assert [float(row["eps"]) for row in table] == [pytest.approx(0.1), 0.2]
    assert all(row["val_verified"] == "" and 0 <= float(row["val_pgd"]) <= 1 for row in table)
    names = {path.name for path in trained.iterdir()}
    assert {"best.ckpt", "last.ckpt", "model.pt", "README.md", "learning_curve.png"} <= names
    assert "model.onnx" not in names  # which would hold one draw for ever
    assert "Nothing is verified" in (trained / "README.md").read_text()
    assert is_randomized(load_model(trained / "model.pt"))


def test_a_run_is_tested_by_eot(trained, capsys):
    assert run(trained, command="test") == 0
    assert "judged by 3 fresh draws" in capsys.readouterr().out
    report = json.loads((trained / "test.json").read_text())
    (row,) = report["summary"]
    assert row["verified"] is None
    assert report["meta"]["samples"] == 20
    clean, attacked = report["accuracies"]
    assert (clean["eps"], attacked["eps"]) == (0.0, 0.2)
    assert (clean["ensemble"], attacked["ensemble"]) == (row["clean"], row["pgd"])
    assert "| 20, test | 0.2 |" in (trained / "README.md").read_text()


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_to_the_same_result(trained, tmp_path, monkeypatch):
    from lirpa_ext.training.module import CertifiedClassifier

    original = CertifiedClassifier.training_step

    def dying(self, batch, batch_idx):
        if self.global_step == 6:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CertifiedClassifier, "training_step", dying)
    with pytest.raises(Killed):
        run(tmp_path, "--checkpoint_every", "3")
    monkeypatch.setattr(CertifiedClassifier, "training_step", original)
    assert run(tmp_path, "--checkpoint_every", "3") == 0
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (tmp_path, trained)]
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=0, atol=0)
    assert rows(tmp_path) == rows(trained)


def test_the_loss_is_the_sum_that_the_source_prints():
    """(2.2.20), its parts computed by themselves from the same draws."""
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    model = make_adv_bnn(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 5)))
    ball = PerturbationLpNorm(0.1, math.inf, 0.0, 1.0)

    def value(kappa: float, weight: float, regularizer: str | None = "mean") -> torch.Tensor:
        torch.manual_seed(5)
        loss = Loss("adv-bnn", attack_steps=3, graddiv=regularizer)
        return randomized_loss(loss, model, x, y, ball, Values(0.1, kappa, 1.0, weight), samples=50)

    torch.manual_seed(5)
    clean = elbo_loss(model, model(x), y, 50)
    torch.testing.assert_close(value(1.0, 0.0), clean)
    torch.manual_seed(5)
    source = generator(int(torch.randint(2**62, ())))
    attack = EOT(PGD(3, step_size=0.25, loss="cross-entropy", random_start=False), 1, keep="final")
    attacked = attack(model, x, y, ball, source).inputs
    assert ((attacked - x).abs() <= 0.1 + 1e-6).all()
    assert not torch.equal(attacked, x)
    robust = elbo_loss(model, model(attacked), y, 50)
    torch.testing.assert_close(value(0.0, 0.0), robust)
    regularizer = mean_cosine(gradients(model, x, y, 3, source)).mean()
    torch.testing.assert_close(value(0.0, 0.7), robust + 0.7 * regularizer)
    torch.testing.assert_close(value(0.0, 0.7, None), robust)


def test_the_attack_of_a_step_starts_where_it_is_told():
    """With steps of length (almost) 0 its end is its start: the clean point, or a random one of ball and range."""
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    model = make_adv_bnn(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    ball = PerturbationLpNorm(0.3, math.inf, 0.0, 1.0)
    for random_start in (False, True):
        loss = Loss("adv-bnn", attack_steps=1, step_size=1e-6, random_start=random_start)
        randomized_loss(loss, model, x, y, ball, Values(0.3, 0.0, 1.0), 50)
        distance = (seen[-1] - x).abs()
        assert float(distance.max()) <= 0.3 + 1e-6
        assert (float(distance.mean()) > 0.05) == random_start
        assert 0 <= float(seen[-1].min()) <= float(seen[-1].max()) <= 1


def test_the_attack_of_a_step_has_the_momentum_that_it_is_told():
    """The points of a step are those of the same attack by itself; without momentum they are others."""
    torch.manual_seed(0)
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    model = make_adv_bnn(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 5)), 0.5)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    ball = PerturbationLpNorm(0.3, math.inf, 0.0, 1.0)
    ends = {}
    for momentum in (0.0, 1.0):
        torch.manual_seed(5)
        randomized_loss(
            Loss("adv-bnn", attack_steps=3, momentum=momentum), model, x, y, ball, Values(0.3, 0.0, 1.0), 50
        )
        ends[momentum] = seen[-1]
        torch.manual_seed(5)
        source = generator(int(torch.randint(2**62, ())))
        attack = PGD(3, step_size=0.25, loss="cross-entropy", random_start=False, momentum=momentum)
        torch.testing.assert_close(ends[momentum], EOT(attack, 1, keep="final")(model, x, y, ball, source).inputs)
    assert not torch.equal(ends[0.0], ends[1.0])


def test_a_smaller_last_batch_does_not_weigh_the_divergence_more(monkeypatch):
    """The KL term is over the training set, here 12 images, counted as 2 batches of 8; not 2 batches of the last 4."""
    from lightning.pytorch import Trainer

    from lirpa_ext.training import CertifiedClassifier, Schedule

    network = Network("2C2F", [1, 8, 8], classes=5, randomized="adv-bnn")
    module = CertifiedClassifier(network, Loss("adv-bnn", attack_steps=1), 0.1, math.inf, Schedule(kappa=[0.0, 0.0]))
    data = DataLoader(TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 5), batch_size=8)
    seen = []

    def counted(*arguments):
        seen.append((len(arguments[2]), arguments[-1]))
        return randomized_loss(*arguments)

    monkeypatch.setattr("lirpa_ext.training.module.randomized_loss", counted)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=1, limit_val_batches=0, accelerator="cpu", **quiet).fit(module, data)
    assert seen == [(8, 16), (4, 16)]


def test_batch_norm_keeps_the_statistics_of_clean_batches_in_attack_and_regularizer():
    model = make_adv_bnn(network()).train()
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    passes = []
    norm = model[1]
    norm.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    loss = Loss("adv-bnn", attack_steps=2, graddiv="kappa")
    randomized_loss(loss, model, x, y, PerturbationLpNorm(0.1, math.inf), Values(0.1, 0.0, 1.0, 1.0), 50).backward()
    assert passes.count(True) == 2  # clean, and the loss at the attacked points
    assert passes.count(False) >= 3
    assert norm.training
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("3C2F", [1, 28, 28], 320 + 18496 + 73856 + 6272 * 1024 + 1024 + 10250),
        ("VGG16", [3, 32, 32], 14728266),  # of the usual CIFAR-10 net with batch norm
        ("6C1F", [3, 96, 96], 896 + 18496 + 73856 + 295168 + 590080 + 1180160 + 2 * 1248 + 5130),
    ],
)
def test_networks_of_the_source(name, shape, parameters):
    """A.1, parameters counted by hand from its notation."""
    model = build(Network(name, shape))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_networks_become_randomized_by_name():
    made = build(Network("2C2F", [1, 8, 8], mean=[0.5], randomized="rse", options={"init": 0.3}))
    assert [layer.level for layer in made.modules() if isinstance(layer, Noise)] == [0.3, 0.1]
    with pytest.raises(ConfigError, match="known are adv-bnn, rse"):
        build(Network("2C2F", [1, 8, 8], randomized="bnn"))
    with pytest.raises(ConfigError, match="which is not set"):
        build(Network("2C2F", [1, 8, 8], options={"init": 0.3}))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.network.randomized", "bnn"], "network.randomized is 'bnn'"),
        (["--model.network.randomized", "rse"], "network.randomized: adv-bnn"),
        (["--model.loss.momentum", "-1"], "loss.momentum must be 0 or more"),
        (["--model.loss.name", "pgd", "--model.loss.graddiv", "null"], "deterministic networks"),
        (["--model.network.options", "{sigma: 0.1}"], "sigma"),
        (["--model.network.options", "{prior_std: -1.0}"], "prior_std is a standard deviation"),
        (["--model.loss.graddiv", "cosine"], "known are kappa, kappa-banerjee, mean, max, smooth-max, dpp"),
        (["--model.loss.graddiv", "null"], "name it in loss.graddiv"),
        (["--model.schedule.graddiv", "[0, 0]"], "has weight 0"),
        (["--model.schedule.graddiv", "[0, -1]"], "both 0 or more"),
        (["--model.schedule.graddiv_ramp", "[1]"], "[warm-up, ramp]"),
        (["--model.loss.graddiv_draws", "1"], "2 or more"),
        (["--model.optimizer.std_factor", "0"], "std_factor must be positive"),
        (["--model.loss.kl_factor", "-1"], "kl_factor"),
        (["--model.loss.step_size", "0"], "step_size"),
        (["--model.evaluation.attack_steps", "0"], "judged by an attack"),
        (["--model.evaluation.method", "bcp"], "no bound verifies"),
        (["--model.norm", "1"], "p > 1"),
    ],
)
def test_configurations_that_cannot_be_run(arguments, told, tmp_path, capsys):
    assert run(tmp_path, *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "last.ckpt").exists()


class Tied(nn.Module):
    def __init__(self, once):
        super().__init__()
        self.a = nn.Linear(6, 6, bias=False)
        self.b = self.a if once else nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_a_weight_has_one_posterior():
    with pytest.raises(InvalidInputError, match=r"'a.weight' and 'b.weight' are one weight"):
        make_adv_bnn(Tied(once=False))
    one, twice = (kl_divergence(make_adv_bnn(net)) for net in (Tied(True).a, Tied(True)))
    assert one.shape == twice.shape == () and twice < 1.5 * one
