"""EOT: one draw of a deterministic network is PGD, more of a randomized one average, and seeds reproduce."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lirpa_ext import PerturbationLpNorm
from lirpa_ext.attacks import EOT, FGM, FGSM, PGD, AutoAttack, mean_output
from lirpa_ext.domain.specifications import margins
from lirpa_ext.errors import InvalidInputError
from lirpa_ext.randomized import RandomLayer, is_randomized, sample

NORMS = [2.0, math.inf]
BALL = PerturbationLpNorm(0.3, math.inf, 0.0, 1.0)


class NoisyLinear(RandomLayer):
    """Weights with Gaussian noise: the smallest Bayesian layer."""

    def __init__(self, inputs, outputs, std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64) / inputs**0.5)
        self.std = std

    def draw(self, generator):
        return self.weight + self.std * torch.randn(self.weight.shape, dtype=torch.float64, generator=generator)

    def held(self, x, draws):
        pairs = zip(x.chunk(len(draws)), draws, strict=True)
        return torch.cat([functional.linear(part, weight) for part, weight in pairs])


@pytest.fixture
def batch():
    return torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1])


@pytest.fixture
def randomized():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), NoisyLinear(16, 12, 0.3), nn.ReLU(), NoisyLinear(12, 4, 0.3))


@pytest.fixture
def deterministic():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.margins, b.margins)


@pytest.mark.parametrize("average", ["gradients", "outputs"])
@pytest.mark.parametrize("loss", ["margin", "cross-entropy", "dlr"])
@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
@pytest.mark.parametrize("draws", [1, 7])
def test_eot_of_a_deterministic_network_is_the_attack_bit_by_bit(batch, deterministic, norm, loss, average, draws):
    x, y = batch
    ball = PerturbationLpNorm(torch.linspace(0, 0.4, 5, dtype=torch.float64), norm, 0.0, 1.0)
    for dtype in (torch.float32, torch.float64):
        for attack in (PGD(6, restarts=2, loss=loss), FGSM(loss)):
            model, points = deterministic.to(dtype), x.to(dtype)
            assert same(EOT(attack, draws, average)(model, points, y, ball), attack(model, points, y, ball))


@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
def test_eot_pgd_is_the_loop_that_the_source_prints(batch, randomized, norm):
    """(2.2.8) and (2.1.6), written out, with draws from a generator of the same seed."""
    x, y = batch
    eps, steps, draws = 0.3, 4, 3
    attack = EOT(PGD(steps, step_size=0.25, loss="cross-entropy", random_start=False), draws, keep="final")
    found = attack(randomized, x, y, PerturbationLpNorm(eps, norm, 0.0, 1.0), torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    sample(randomized, generator, draws)  # of the clean score
    points = x.clone()
    for _ in range(steps):
        gradients = []
        for _ in range(draws):
            at = points.clone().requires_grad_()
            loss = functional.cross_entropy(sample(randomized, generator)(at), y, reduction="sum")
            gradients.append(torch.autograd.grad(loss, at)[0])
        mean = sum(gradients) / draws
        if norm == 2:
            points = points + 0.25 * eps * mean / mean.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            shift = points.clamp(0, 1) - x
            points = x + shift * (eps / shift.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        else:
            points = (points + 0.25 * eps * mean.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    torch.testing.assert_close(found.inputs, points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("average", ["gradients", "outputs"])
def test_the_two_averages_are_what_they_are_called(batch, randomized, average):
    x, y = batch
    eot = EOT(PGD(1), draws=6, average=average)
    target = eot.target(randomized, x, y, BALL, torch.Generator().manual_seed(0), None)
    found = target.gradient(x, "cross-entropy")

    generator = torch.Generator().manual_seed(0)
    sample(randomized, generator, 6)
    logits, at = [], x.clone().requires_grad_()
    for network in [sample(randomized, generator) for _ in range(6)]:
        logits.append(network(at))
    losses = [functional.cross_entropy(z, y, reduction="none") for z in logits]
    if average == "outputs":
        losses = [-torch.stack([z.softmax(1) for z in logits]).mean(0).log()[range(5), y]]
    expected = torch.autograd.grad(torch.stack(losses).mean(0).sum(), at)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_two_averages_differ(batch, randomized):
    x, y = batch
    targets = [EOT(PGD(1), 6, average).target(randomized, x, y, BALL, torch.Generator().manual_seed(0), None)
               for average in ("gradients", "outputs")]  # fmt: skip
    a, b = (target.gradient(x, "cross-entropy") for target in targets)
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize(
    "attack",
    [PGD(3), FGSM(), EOT(PGD(3), 4), EOT(FGM(), 4, "outputs", "final")],
    ids=["pgd", "fgsm", "eot-pgd", "eot-fgm"],
)
def test_seeds_reproduce_and_the_global_generator_is_left_alone(batch, randomized, attack):
    x, y = batch
    before = torch.get_rng_state()
    runs = [attack(randomized, x, y, BALL, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].margins, runs[2].margins)
    assert torch.equal(before, torch.get_rng_state())


def test_each_step_takes_fresh_draws(batch, randomized):
    x, y = batch
    target = EOT(PGD(1), draws=2).target(randomized, x, y, BALL, torch.Generator().manual_seed(0), None)
    assert not torch.equal(target.gradient(x, "margin"), target.gradient(x, "margin"))


def test_more_draws_come_closer_to_the_expected_gradient(batch, randomized):
    x, y = batch

    def gradient(draws, seed):
        target = EOT(PGD(1), draws).target(randomized, x, y, BALL, torch.Generator().manual_seed(seed), None)
        return target.gradient(x, "cross-entropy")

    expected = gradient(2000, 99)
    few, many = (
        torch.stack([(gradient(draws, seed) - expected).square().sum() for seed in range(10)]).mean()
        for draws in (2, 32)
    )
    assert 8 < few / many < 32  # 16 in expectation


def test_draws_in_several_passes_are_the_same(batch, randomized, monkeypatch):
    x, y = batch
    attack = EOT(PGD(3), draws=5)
    whole = attack(randomized, x, y, BALL)
    monkeypatch.setattr("lirpa_ext.attacks.eot._MOST_ROWS", 10)
    parts = attack(randomized, x, y, BALL)
    torch.testing.assert_close(whole.inputs, parts.inputs)
    torch.testing.assert_close(whole.margins, parts.margins)


def test_keep_final_has_the_end_of_a_run_and_keep_best_no_worse_a_score(batch, randomized):
    x, y = batch
    attack = PGD(5, step_size=1.0, random_start=False)
    final, best, default = (
        EOT(attack, 4, keep=keep)(randomized, x, y, BALL, torch.Generator().manual_seed(0))
        for keep in ("final", "best", None)
    )
    assert (best.margins <= final.margins).all() and (best.margins < final.margins).any()
    assert final.margins.isfinite().all()
    assert same(final, default)


def test_without_eot_there_is_one_draw(batch, randomized):
    x, y = batch
    for attack in (PGD(4), FGSM()):
        assert same(attack(randomized, x, y, BALL), EOT(attack, 1)(randomized, x, y, BALL))


def test_mean_output_is_the_mean_probability():
    logits = 3 * torch.randn(6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(mean_output(logits).exp(), logits.softmax(2).mean(0))
    assert mean_output(logits[:1]) is not logits and torch.equal(mean_output(logits[:1]), logits[0])
    large = torch.tensor([[[1000.0, 0.0]], [[1000.0, 0.0]]])
    assert mean_output(large)[0, 0] == 0 and mean_output(large)[0, 1] == -1000


def test_a_draw_that_gives_nan_is_no_success(batch):
    class Breaks(RandomLayer):
        def draw(self, generator):
            return float(torch.rand((), generator=generator) < 0.5)

        def held(self, x, draws):
            rows = x.flatten(1)[:, :4]
            pairs = zip(rows.chunk(len(draws)), draws, strict=True)
            return torch.cat([part * (math.nan if broken else 1.0) for part, broken in pairs])

    x, y = batch
    found = EOT(PGD(3), draws=20)(nn.Sequential(Breaks()), x, y, BALL)
    assert not (found.margins <= 0).any()


def test_bad_input(batch, randomized):
    for options in ({"draws": 0}, {"average": "loss"}, {"keep": "first"}):
        with pytest.raises(InvalidInputError):
            EOT(PGD(2), **options)
    for wrapped in (EOT(PGD(2)), "pgd"):
        with pytest.raises(InvalidInputError, match="wraps an attack"):
            EOT(wrapped)
    x, y = batch
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    with pytest.raises(InvalidInputError, match="rand"):
        AutoAttack("standard")(randomized, x, y, BALL)


def test_autoattack_rand_draws_from_the_generator(batch, randomized):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    assert is_randomized(randomized)
    x, y = batch
    before = torch.get_rng_state()
    attack = EOT(AutoAttack("rand"), draws=4)
    runs = [attack(randomized, x[:2], y[:2], BALL, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert same(*runs)
    assert torch.equal(before, torch.get_rng_state())
    assert (runs[0].inputs - x[:2]).abs().max() <= 0.3 + 1e-6
    clean = margins(mean_output(sample(randomized, torch.Generator().manual_seed(0), 100).each(x[:2])), y[:2])
    assert (runs[0].margins < clean).any()
