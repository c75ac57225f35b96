"""GradDiv against closed forms, loops in float64, scipy's von Mises-Fisher distribution and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lirpa_ext.errors import InvalidInputError
from lirpa_ext.randomized import REGULARIZERS, gradients, make_adv_bnn, make_rse, sample, von_mises_fisher
from lirpa_ext.randomized.graddiv import FLOOR, JITTER, cosines, dpp, kappa, mean_cosine, mean_resultant_length

N, D = 3, 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    ).double()


@pytest.fixture(params=["adv-bnn", "rse"])
def randomized(request):
    return {"adv-bnn": make_adv_bnn, "rse": make_rse}[request.param](network())


@pytest.fixture
def batch():
    return torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 4, 1])


def by_hand(name: str, gradient: torch.Tensor) -> float:
    """A regularizer of one sample's gradients (n, d), in loops."""
    n, d = gradient.shape
    units = [row / math.sqrt(sum(float(v) ** 2 for v in row)) for row in gradient]
    rho = math.sqrt(sum((sum(float(unit[i]) for unit in units) / n) ** 2 for i in range(d)))
    cosine = [[float(a @ b) for b in units] for a in units]
    pairs = [cosine[i][j] for i in range(n) for j in range(n) if i != j]
    if name == "kappa":
        return rho * (d - rho) / (1 - rho**2) / d
    if name == "kappa-banerjee":
        return rho * (d - rho**2) / (1 - rho**2) / d
    if name == "mean":
        return sum(pairs) / (n * (n - 1))
    if name == "max":
        return max(pairs)
    if name == "smooth-max":
        return math.log(sum(math.exp(pair) for pair in pairs))
    assert name == "dpp"
    gram = (1 - JITTER) * torch.tensor(cosine, dtype=torch.float64) + JITTER * torch.eye(n, dtype=torch.float64)
    return -math.log(float(torch.linalg.eigvalsh(gram).prod()))


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_regularizers_are_their_formulas(name, dtype):
    gradient = torch.randn(N, 5, D, dtype=torch.float64) + 0.5
    found = REGULARIZERS[name](gradient.to(dtype))
    expected = torch.tensor([by_hand(name, gradient[:, i]) for i in range(5)], dtype=dtype)
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected)


def vectors(*rows: tuple[float, ...]) -> torch.Tensor:
    """Gradients of one sample, (n, 1, d)."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


E1, E2, E3 = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
CASES = {
    # gradients: rho, then the regularizers; 1 - rho^2 = 2/3 for three orthogonal directions
    "orthogonal": (
        vectors(E1, (0.0, 5.0, 0.0), (0.0, 0.0, 0.1)), 1 / math.sqrt(3),
        {"kappa": (3 - 1 / math.sqrt(3)) / math.sqrt(3) / 2, "kappa-banerjee": (3 - 1 / 3) / math.sqrt(3) / 2,
         "mean": 0.0, "max": 0.0, "smooth-max": math.log(6), "dpp": 0.0},
    ),
    "opposite": (
        vectors(E1, (-2.0, 0.0, 0.0)), 0.0,
        {"kappa": 0.0, "kappa-banerjee": 0.0, "mean": -1.0, "max": -1.0, "smooth-max": math.log(2) - 1,
         "dpp": -math.log(2 - JITTER) - math.log(JITTER)},
    ),
    "identical": (
        vectors(E2, E2, (0.0, 3.0, 0.0)), 1.0,
        {"kappa": 2 / 3 / FLOOR, "kappa-banerjee": 2 / 3 / FLOOR, "mean": 1.0, "max": 1.0,
         "smooth-max": math.log(6) + 1, "dpp": -math.log(3 - 2 * JITTER) - 2 * math.log(JITTER)},
    ),
    "two alike and one across": (
        vectors(E1, E1, E3), math.sqrt(5) / 3,
        {"mean": 1 / 3, "max": 1.0, "smooth-max": math.log(2 * math.e + 4),
         "dpp": -math.log((2 - JITTER) * JITTER)},
    ),
    "at 60 degrees": (
        vectors(E1, (0.5, math.sqrt(0.75), 0.0)), math.cos(math.pi / 6),
        {"mean": 0.5, "max": 0.5, "smooth-max": math.log(2) + 0.5, "dpp": -math.log(1 - (0.5 * (1 - JITTER)) ** 2)},
    ),
    "zero counts as orthogonal to all": (
        vectors(E1, (0.0, 0.0, 0.0)), 0.5,
        {"kappa": 0.5 * 2.5 / 0.75 / 3, "kappa-banerjee": 0.5 * 2.75 / 0.75 / 3, "mean": 0.0, "max": 0.0,
         "smooth-max": math.log(2), "dpp": 0.0},
    ),
    "all zero": (
        torch.zeros(3, 1, 4, dtype=torch.float64), 0.0,
        {"kappa": 0.0, "kappa-banerjee": 0.0, "mean": 0.0, "max": 0.0, "smooth-max": math.log(6), "dpp": 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_closed_forms(case):
    gradient, rho, expected = CASES[case]
    assert mean_resultant_length(gradient).item() == pytest.approx(rho, abs=1e-12)
    for name, value in expected.items():
        assert REGULARIZERS[name](gradient).item() == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("case", ["opposite", "identical", "zero counts as orthogonal to all", "all zero"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_no_gradient_is_nan_where_a_formula_is_singular(case, name):
    gradient = CASES[case][0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(REGULARIZERS[name](gradient).sum(), gradient)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_lengths_do_not_count(name):
    """Gradients of a confident network are as small as 1e-30, whose squares float32 has not."""
    gradient = torch.randn(N, 6, D)
    lengths = 10.0 ** torch.linspace(-30, 15, N * 6).view(N, 6, 1)
    torch.testing.assert_close(REGULARIZERS[name](gradient * lengths), REGULARIZERS[name](gradient))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_have_the_right_gradients(name):
    gradient = (torch.randn(N, 2, 4, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(REGULARIZERS[name], gradient)


def test_the_two_forms_of_kappa_differ_by_less_than_a_half():
    gradient = torch.randn(5, 50, 9, dtype=torch.float64) + torch.linspace(0, 5, 50).view(1, 50, 1)
    statistics = von_mises_fisher(gradient)
    rho = statistics.rho
    assert rho.min() < 0.5 < 0.95 < rho.max()
    torch.testing.assert_close(statistics.banerjee - statistics.printed, rho**2 / (1 + rho))
    torch.testing.assert_close(kappa(gradient) * 9, statistics.printed)


@pytest.mark.parametrize("concentration", [2.0, 20.0, 200.0])
def test_kappa_is_that_of_a_von_mises_fisher_distribution(concentration):
    stats = pytest.importorskip("scipy.stats", reason="the distribution is scipy's")
    d = 20
    mean = torch.nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0)
    drawn = stats.vonmises_fisher(mean.numpy(), concentration).rvs(20000, random_state=1)
    found = von_mises_fisher(torch.from_numpy(drawn).unsqueeze(1))
    assert found.banerjee.item() == pytest.approx(concentration, rel=0.05)
    assert found.printed.item() == pytest.approx(concentration, rel=0.05, abs=0.5)


def test_gradients_are_those_of_one_draw_after_another(randomized, batch):
    x, y = batch
    found = gradients(randomized, x, y, N, generator(5))
    source = generator(5)
    for k in range(N):
        points = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(sample(randomized, source)(points), y, reduction="sum")
        torch.testing.assert_close(found[k], torch.autograd.grad(loss, points)[0].flatten(1))
    assert not torch.allclose(found[0], found[1])
    assert not gradients(randomized, x, y, N, generator(5), create_graph=False).requires_grad


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_are_differentiable_in_the_parameters(randomized, batch, name):
    """Against central differences of the whole: draws, gradients in the input, regularizer."""
    parameters = [p for p in randomized.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in parameters]

    def value() -> torch.Tensor:
        return REGULARIZERS[name](gradients(randomized, *batch, N, generator(2))).mean()

    slopes = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((s * d).sum()) for s, d in zip(slopes, directions, strict=True) if s is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * 1e-6 * d
            values.append(float(value()))
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * 1e-6 * d
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_a_step_against_the_regularizer_spreads_the_gradients(batch):
    """From the same draws: the mean cosine falls, and rho with it."""
    model = make_adv_bnn(network(), prior_std=0.1)
    before = gradients(model, *batch, 8, generator(3))
    (loss := mean_cosine(before).mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    after = gradients(model, *batch, 8, generator(3), create_graph=False)
    assert mean_cosine(after).mean() < loss - 1e-4
    assert mean_resultant_length(after).mean() < mean_resultant_length(before).mean()


# --- Theorem 2.2.1 ---


def test_the_loss_increase_under_eot_is_bounded_by_the_mean_resultant_length(randomized, batch):
    """Delta = alpha ||mean gradient|| + O(alpha^2), and ||mean gradient|| <= mean length rho + their spread.

    The covariance of lengths w and directions v is at most std(w) std(v) = std(w) sqrt(1 - rho^2) in norm.
    """
    x, y = batch
    n, alpha = 20, 1e-5
    found = gradients(randomized, x, y, n, generator(7), create_graph=False)
    mean = found.mean(0)
    length = mean.norm(dim=1)

    def loss(at: torch.Tensor) -> torch.Tensor:
        logits = sample(randomized, generator(7), n).each(at)
        return torch.stack([nn.functional.cross_entropy(some, y, reduction="none") for some in logits]).mean(0)

    step = (mean / length.unsqueeze(1)).view_as(x)
    increase = (loss(x + alpha * step) - loss(x)) / alpha
    torch.testing.assert_close(increase, length, rtol=1e-3, atol=1e-6)
    lengths = found.norm(dim=2)
    rho = mean_resultant_length(found)
    bound = lengths.mean(0) * rho + lengths.std(0, unbiased=False) * (1 - rho**2).sqrt()
    assert (increase <= bound * (1 + 1e-3)).all()
    assert (bound < lengths.mean(0) * 1.2).any()  # and it says something


def test_the_theorem_needs_the_lengths():
    """Directions of resultant length 0 and a mean gradient that is not 0: (2.2.14) holds for no M here."""
    gradient = vectors((2.0, 0.0, 0.0), (-1.0, 0.0, 0.0))
    assert mean_resultant_length(gradient).item() == 0
    assert gradient.mean(0).norm() == 0.5


# --- errors ---


@pytest.mark.parametrize("function", [*REGULARIZERS.values(), von_mises_fisher, cosines, mean_resultant_length])
@pytest.mark.parametrize(
    ("gradient", "told"),
    [
        (torch.randn(1, 3, 4), "2 or more gradients"),
        (torch.randn(3, 4), "2 or more gradients"),
        (torch.randn(3, 4, 1), "2 or more numbers"),
        (torch.full((3, 4, 2), math.nan), "not finite"),
    ],
)
def test_wrong_gradients_are_refused(function, gradient, told):
    with pytest.raises(InvalidInputError, match=told):
        function(gradient)


def test_wrong_options_are_refused(batch):
    gradient = torch.randn(3, 2, 4)
    with pytest.raises(InvalidInputError, match="jitter"):
        dpp(gradient, jitter=0.0)
    with pytest.raises(InvalidInputError, match="floor"):
        kappa(gradient, floor=-1.0)
    with pytest.raises(InvalidInputError, match="'printed' or 'banerjee'"):
        kappa(gradient, form="exact")
    with pytest.raises(InvalidInputError, match="no layer of this Sequential draws"):
        gradients(network(), *batch, 3, generator())
    with pytest.raises(InvalidInputError, match="at least one network"):
        gradients(make_rse(network()), *batch, 0, generator())


@pytest.mark.parametrize("gap", [30.0, 60.0, 86.0, 95.0, 103.0, 200.0])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_are_finite_where_the_loss_is(name, gap):
    """Of a sample that is classified with certainty the gradients are as small as 1e-44, or 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight.mul_(0.1)
        net[1].bias.copy_(torch.tensor([gap, 0.0, 0.0]))
    bnn = make_adv_bnn(net, prior_std=0.05)
    found = gradients(bnn, torch.rand(2, 1, 2, 2), torch.tensor([0, 0]), 3, torch.Generator().manual_seed(0))
    value = REGULARIZERS[name](found).mean()
    value.backward()
    assert torch.isfinite(value)
    for parameter in bnn.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
