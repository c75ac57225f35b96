"""Norm bounds and estimates against the singular values of dense float64 matrices."""

from __future__ import annotations

import doctest
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_ext.domain import norm_bounds as norm_certificates
from lirpa_ext.domain import norms
from lirpa_ext.domain.convolutions import Conv, ConvTranspose
from lirpa_ext.domain.linear_maps import Dense, LinearMap, NonNegative, Scale, WeightedMap
from lirpa_ext.domain.norms import NormBound, NormCache, NormEstimate, PowerIteration, spectral_norm_bound
from lirpa_ext.errors import InvalidInputError

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "peers" / "bcp_mnist_state_dict.npz"


def dense_matrix(linear_map: LinearMap) -> Tensor:
    """(outputs, inputs) in float64: the images of the unit vectors as columns."""
    size = math.prod(linear_map.input_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *linear_map.input_shape)
    return linear_map.double()(basis).flatten(1).t()


def true_norm(linear_map: LinearMap) -> float:
    return float(torch.linalg.svdvals(dense_matrix(linear_map))[0])


def bound_of(linear_map: LinearMap) -> float:
    return float(spectral_norm_bound(linear_map).value)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_conv(seed: int, transposed: bool = False) -> Conv | ConvTranspose:
    """A small random geometry that has an output; 1-D or 2-D, any stride, padding, dilation and groups."""
    rng = random.Random(seed)
    while True:
        dims, groups = rng.choice((1, 2)), rng.choice((1, 1, 2, 3))
        low, high = groups * rng.randint(1, 3), groups * rng.randint(1, 4)
        sizes, kernel, stride, padding, dilation = (
            tuple(rng.randint(*ends) for _ in range(dims)) for ends in ((1, 11), (1, 5), (1, 3), (0, 3), (1, 2))
        )
        try:
            if transposed:
                weight = randn(low, high // groups, *kernel, seed=seed)
                extra = tuple(rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True))
                return ConvTranspose(weight, (low, *sizes), stride, padding, extra, dilation, groups)
            weight = randn(high, low // groups, *kernel, seed=seed)
            return Conv(weight, (low, *sizes), stride, padding, dilation, groups)
        except InvalidInputError:
            continue


# Ways to a norm, by what is switched off: small maps then take the way of larger ones.
WAYS = {"matrix": (), "factorization": ("_DENSE_SIDE",), "ring": ("_DENSE_SIDE", "_GRAM_OPERATIONS")}


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in WAYS[way]:
        monkeypatch.setattr(norm_certificates, limit, 0)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of any size take the way of the largest."""
    take("ring", monkeypatch)


# Bounds


def test_random_convolutions_on_the_ring(ring: None) -> None:
    ratios = []
    for seed in range(250):
        conv = random_conv(seed)
        bound, truth = bound_of(conv), true_norm(conv)
        assert bound >= truth * (1 - 1e-14), (seed, conv.geometry)
        if truth > 0:
            ratios.append(bound / truth)
    assert len(ratios) >= 200
    assert statistics.median(ratios) <= 1.06
    assert max(ratios) <= 2.5


def test_random_transposed_convolutions_on_the_ring(ring: None) -> None:
    ratios = []
    for seed in range(80):
        conv = random_conv(seed, transposed=True)
        bound, truth = bound_of(conv), true_norm(conv)
        assert bound >= truth * (1 - 1e-14), (seed, conv.geometry)
        if truth > 0:
            ratios.append(bound / truth)
    assert statistics.median(ratios) <= 1.15


def test_small_convolutions_are_exact() -> None:
    for seed in range(40):
        conv = random_conv(seed)
        if min(math.prod(conv.input_shape), math.prod(conv.output_shape)) <= 256:
            assert bound_of(conv) == pytest.approx(true_norm(conv), rel=1e-9)


def test_3d_convolution(ring: None) -> None:
    conv = Conv(randn(2, 2, 2, 3, 2), (2, 4, 5, 4), (1, 2, 1), 1)
    assert true_norm(conv) <= bound_of(conv) <= 1.2 * true_norm(conv)


def test_chunks_of_frequencies_change_nothing(monkeypatch: pytest.MonkeyPatch, ring: None) -> None:
    conv = Conv(randn(4, 2, 3, 3), (4, 9, 8), 2, 1, groups=2)
    whole = bound_of(conv)
    monkeypatch.setattr(norm_certificates, "_CHUNK", 50)
    assert bound_of(conv) == pytest.approx(whole, rel=1e-13)


def test_groups_count_once_by_the_largest(way: str) -> None:
    """Norms 2 and 1/4: the map is block-diagonal, so its norm is 2, not their product, nor their sum."""
    weight = torch.tensor([2.0, 0.25], dtype=torch.float64).view(2, 1, 1, 1)
    for flipped in (weight, weight.flip(0)):
        assert bound_of(Conv(flipped, (2, 6, 6), groups=2)) == pytest.approx(2.0, rel=1e-9)
        assert bound_of(ConvTranspose(flipped, (2, 6, 6), groups=2)) == pytest.approx(2.0, rel=1e-9)


# Factorized Gram matrices


def exact_or_refused(linear_map: Conv | ConvTranspose, truth: float) -> bool:
    """Whether a factorization gave the bound, which is never below the norm, and not far above it then."""
    conv = linear_map.adjoint_conv() if isinstance(linear_map, ConvTranspose) else linear_map
    certificates = norm_certificates._factorized(conv, math.inf)
    for certificate in certificates:
        assert truth < certificate.value <= truth * (1 + 2e-6)
    return bool(certificates)


def test_random_convolutions_by_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    take("factorization", monkeypatch)
    for seed in range(150):
        conv = random_conv(seed)
        truth = true_norm(conv)
        assert exact_or_refused(conv, truth) == (truth > 0)
        assert truth * (1 - 1e-14) <= bound_of(conv) <= truth * (1 + 2e-6)


def test_transposed_and_3d_convolutions_by_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    take("factorization", monkeypatch)
    for seed in range(60):
        transpose = random_conv(seed, transposed=True)
        assert isinstance(transpose, ConvTranspose)
        truth = true_norm(transpose)
        assert bound_of(transpose) >= truth * (1 - 1e-14)
        if all(extra < step for extra, step in zip(transpose.output_padding, transpose.stride, strict=True)):
            assert bound_of(transpose) <= truth * (1 + 2e-6)
    conv = Conv(randn(2, 2, 2, 3, 2), (2, 4, 5, 4), (1, 2, 1), 1)
    assert exact_or_refused(conv, true_norm(conv))


MODERATE = {
    "first-layer": Conv(randn(8, 1, 3, 3), (1, 24, 24), 1, 1),
    "halving": Conv(randn(8, 6, 4, 4), (6, 18, 14), 2, 1),
    "dilated": Conv(randn(5, 5, 3, 2), (5, 13, 15), 1, 2, 2),
    "grouped": Conv(randn(12, 3, 3, 3), (6, 12, 12), 1, 1, groups=2),
    "long": Conv(randn(4, 3, 9), (3, 150), 2, 4),
    "skipping": Conv(randn(12, 5, 2, 2), (5, 24, 24), 3),
}


@pytest.mark.parametrize("name", MODERATE)
def test_moderate_convolutions_by_factorization(name: str) -> None:
    """Larger than what is materialized: no switch is needed, and the ring alone would be less tight."""
    conv = MODERATE[name]
    assert min(math.prod(conv.input_shape), math.prod(conv.output_shape)) > norm_certificates._DENSE_SIDE
    truth = true_norm(conv)
    assert exact_or_refused(conv, truth)
    assert truth < bound_of(conv) <= truth * (1 + 2e-6)


@pytest.mark.parametrize("of_outputs", [True, False])
@pytest.mark.parametrize("name", MODERATE)
def test_factorization_refuses_what_is_below_the_norm(name: str, of_outputs: bool) -> None:
    truth, gram = true_norm(MODERATE[name]), norm_certificates._Gram(MODERATE[name], of_outputs)
    for excess in (-0.5, -1e-2, -1e-4, -1e-6, -1e-9, -1e-12, 0.0):
        assert not gram.at_most(truth * (1 + excess)), excess
    for excess in (1e-6, 1e-3, 1.0):
        assert gram.at_most(truth * (1 + excess)), excess


@pytest.mark.parametrize("name", MODERATE)
def test_a_wrong_estimate_costs_tightness_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, top = true_norm(MODERATE[name]), norm_certificates._Gram.top

    def off_by(factor: float) -> float:
        def wrong(gram: norm_certificates._Gram) -> tuple[float, Tensor]:
            square, vector = top(gram)
            return square * factor**2, vector

        monkeypatch.setattr(norm_certificates._Gram, "top", wrong)
        return bound_of(MODERATE[name])

    assert truth < off_by(1 - 3e-5) <= truth * (1 + 1e-4)
    take("ring", monkeypatch)
    on_the_ring = bound_of(MODERATE[name])
    monkeypatch.undo()
    assert off_by(0.9) == off_by(2.5) == on_the_ring


def test_the_largest_convolutions_are_left_to_the_ring() -> None:
    conv = Conv(randn(64, 32, 3, 3), (32, 32, 32), 1, 1)
    assert norm_certificates._factorized(conv, math.inf) == []


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"no reference weights at {REFERENCE.parent}")
@pytest.mark.parametrize(
    ("key", "shape", "truth", "figure"),
    [
        ("0.weight", (1, 28, 28), 0.4875182139459902, 0.4883423),
        ("2.weight", (16, 14, 14), 1.4841377045421638, 1.4916883),
    ],
)
def test_convolutions_of_the_reference_net(
    key: str, shape: tuple[int, ...], truth: float, figure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact by a factorization; the ring alone reproduces the figures published for it."""
    with np.load(REFERENCE) as state:
        conv = Conv(torch.from_numpy(state[key]), shape, 2, 1)
    assert truth <= bound_of(conv) <= truth * (1 + 2e-6)
    take("ring", monkeypatch)
    assert truth <= bound_of(conv) <= figure * (1 + 1e-6)
    iteration = PowerIteration(conv.double())
    estimate = float(iteration.converge(conv.double(), 1e-12, 3000).value)
    assert estimate <= truth * (1 + 1e-12)
    # The top singular values are close: thousands of steps are not enough for more digits.
    assert estimate == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    "shape", [(7, 7), (3, 40), (40, 3), (1, 9), (300, 500)], ids=lambda shape: "x".join(map(str, shape))
)
def test_dense_is_exact(shape: tuple[int, int]) -> None:
    dense = Dense(randn(*shape), lead_shape=(2,))
    truth = float(torch.linalg.svdvals(dense.weight)[0])
    assert truth <= bound_of(dense) <= truth * (1 + 1e-8)


def test_dense_of_rank_one_and_orthogonal() -> None:
    """All singular values equal, or all but one 0: the rounding margin holds, and is not large."""
    for seed in range(20):
        q = torch.linalg.qr(randn(30, 30, seed=seed)).Q
        for matrix in (q, torch.outer(q[0], q[1])):
            truth = float(torch.linalg.svdvals(matrix)[0])
            assert truth * (1 - 2e-16) <= bound_of(Dense(matrix)) <= truth * (1 + 1e-10)


@pytest.mark.parametrize("factor", [randn(3, 1, 1), randn(3, 2, 4), randn(2, 1, 2, 4)])
@pytest.mark.parametrize("shape", [(3, 2, 4), (1, 2, 4), (1, 1, 1)])
def test_scale_is_exact_with_duplicates(factor: Tensor, shape: tuple[int, ...]) -> None:
    scale = Scale(factor, shape)
    assert true_norm(scale) * (1 - 1e-15) <= bound_of(scale) <= true_norm(scale) * (1 + 1e-10)


@pytest.mark.parametrize(
    ("fn", "exact"),
    [
        (lambda x: F.avg_pool2d(x, 2), True),
        (lambda x: F.avg_pool2d(x, 3, 2, 1), False),
        (lambda x: x.mean((2, 3)), True),
        (lambda x: x.sum(1), True),
        (lambda x: F.pad(x, (1, 0, 2, 3)), True),
        (lambda x: x[:, [1, 1, 0]], False),
        (lambda x: x.transpose(1, 2), True),
    ],
    ids=["avg-pool", "avg-pool-overlapping", "mean", "sum", "pad", "gather", "transpose"],
)
def test_nonnegative(fn: Callable[[Tensor], Tensor], exact: bool) -> None:
    linear_map = NonNegative(fn, (2, 6, 6))
    truth, bound = true_norm(linear_map), bound_of(linear_map)
    with torch.inference_mode():
        assert bound_of(linear_map) == bound
    assert truth * (1 - 1e-12) <= bound <= truth * (1 + 1e-6 if exact else 1.5)


def test_schur_bound_wins_where_it_is_smaller(ring: None) -> None:
    """A kernel of 5 on a single pixel: the ring sees more of it than the map does."""
    conv = Conv(torch.ones(1, 1, 5, dtype=torch.float64), (1, 1), padding=2)
    assert bound_of(conv) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_sizes(dtype: torch.dtype, size: float, way: str) -> None:
    maps: list[WeightedMap] = [
        Dense(randn(4, 5)),
        Conv(randn(2, 2, 3, 3), (2, 6, 6), 2, 1),
        Conv(randn(2, 2, 1, 1), (2, 5, 5), 3, 0),
        Conv(randn(2, 2, 7, 7), (2, 1, 1), 1, 3),
        ConvTranspose(randn(2, 2, 3, 3), (2, 4, 4), 2, 1, 1),
        Scale(randn(3, 1), (1, 4)),
    ]
    for original in maps:
        weight = (original.weight * size).to(dtype).requires_grad_()
        linear_map = original.with_weight(weight)
        bound = spectral_norm_bound(linear_map).value
        assert bound.dtype == dtype
        truth = true_norm(linear_map.with_weight(weight.detach().double() / (size or 1.0))) * (size or 1.0)
        assert truth * (1 - 1e-14) <= bound.item() <= truth * 3
        bound.backward()
        assert weight.grad is not None and weight.grad.isfinite().all()
        assert (float(weight.grad.norm()) > 0) == (size > 0)


def test_float32_is_rounded_up() -> None:
    for seed in range(50):
        dense = Dense(randn(3, 4, seed=seed).float())
        assert float(spectral_norm_bound(dense).value.double()) >= true_norm(dense)


def test_weights_that_meet_only_padding_give_zero() -> None:
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[0, 0, 0, 0] = 1.0
    weight.requires_grad_()
    bound = spectral_norm_bound(Conv(weight, (1, 1, 1), padding=1)).value
    bound.backward()
    assert bound == 0 and weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_without_norm_are_refused(bad: float) -> None:
    weight = torch.ones(2, 1, 3, 3)
    weight[1, 0, 2, 2] = bad
    for linear_map in (Dense(weight.flatten(1)), Conv(weight, (1, 5, 5)), Scale(weight, (2, 1, 3, 3))):
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            spectral_norm_bound(linear_map)
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            NormCache().bound("layer", linear_map)


GRADIENT_MAPS: dict[str, WeightedMap] = {
    "dense": Dense(randn(4, 6)),
    "dense-tall": Dense(randn(6, 4)),
    "scale": Scale(randn(3, 1, 1), (1, 2, 2)),
    "conv": Conv(randn(3, 2, 3, 3), (2, 5, 5), 1, 1),
    "conv-strided-groups": Conv(randn(4, 1, 3, 2), (2, 6, 5), 2, 1, groups=2),
    # the second of three groups decides, at the highest frequency
    "conv-groups": Conv(
        torch.tensor([1.0, 2.0, 1.0]).double().view(3, 1, 1) * torch.tensor([[-0.4, 1.0, -0.5]]).double(),
        (3, 8),
        padding=1,
        groups=3,
    ),
    "conv-transpose": ConvTranspose(randn(2, 3, 3, 3), (2, 4, 4), 2, 1, 1),
}


@pytest.mark.parametrize("name", GRADIENT_MAPS)
def test_gradient_of_the_bound(name: str, way: str) -> None:
    linear_map = GRADIENT_MAPS[name]
    weight = linear_map.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: spectral_norm_bound(linear_map.with_weight(w)).value, weight, atol=1e-5, rtol=1e-5
    )
    if way != "ring":  # exact bounds: their gradient is that of the dense singular value
        (ours,) = torch.autograd.grad(spectral_norm_bound(linear_map.with_weight(weight)).value, weight)
        truth = torch.linalg.svdvals(dense_matrix(linear_map.with_weight(weight)))[0]
        torch.testing.assert_close(ours, torch.autograd.grad(truth, weight)[0], atol=1e-5, rtol=1e-5)


def test_gradient_where_schur_wins(ring: None) -> None:
    weight = torch.tensor([[[0.1, 0.2, 1.0, 0.3, 0.4]]], dtype=torch.float64, requires_grad=True)
    bound = spectral_norm_bound(Conv(weight, (1, 1), padding=2)).value
    (gradient,) = torch.autograd.grad(bound, weight)
    torch.testing.assert_close(gradient, torch.tensor([[[0.0, 0, 1, 0, 0]]], dtype=torch.float64))


def test_no_graph_without_need() -> None:
    weight = randn(3, 4).requires_grad_()
    with torch.no_grad():
        assert not spectral_norm_bound(Dense(weight)).value.requires_grad
    assert not spectral_norm_bound(Dense(weight.detach())).value.requires_grad
    assert spectral_norm_bound(Dense(weight)).value.requires_grad


def test_estimate_and_bound_are_unrelated_types() -> None:
    assert not issubclass(NormBound, NormEstimate) and not issubclass(NormEstimate, NormBound)


# Cache


def count_certificates(monkeypatch: pytest.MonkeyPatch) -> list[LinearMap]:
    made: list[LinearMap] = []
    original = norms.norm_bound

    def counted(linear_map: LinearMap) -> object:
        made.append(linear_map)
        return original(linear_map)

    monkeypatch.setattr(norms, "norm_bound", counted)
    return made


def test_cache_hits_and_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_certificates(monkeypatch)
    cache, weight = NormCache(), randn(2, 2, 3, 3)

    def expect(linear_map: LinearMap, computations: int, key: str = "conv") -> None:
        assert float(cache.bound(key, linear_map).value) == bound_of(linear_map)
        made.pop()  # bound_of's own
        assert len(made) == computations

    expect(Conv(weight, (2, 6, 6)), 1)
    expect(Conv(weight, (2, 6, 6)), 1)
    expect(Conv(weight.clone(), (2, 6, 6)), 1)
    expect(Conv(weight, (2, 6, 6), padding=1), 2)
    expect(Conv(weight, (2, 6, 6), padding=1, dilation=2), 3)
    expect(Conv(weight, (2, 7, 7), padding=1, dilation=2), 4)
    expect(Conv(weight.float(), (2, 7, 7), padding=1, dilation=2), 5)
    expect(ConvTranspose(weight, (2, 6, 6)), 6)
    expect(ConvTranspose(weight, (2, 6, 6)), 7, key="another")
    weight.data.mul_(2)
    expect(ConvTranspose(weight, (2, 6, 6)), 8)
    cache.clear()
    expect(ConvTranspose(weight, (2, 6, 6)), 9)


def test_cache_does_not_remember_maps_without_weight() -> None:
    """Two functions cannot be told apart, so the second must not get the bound of the first."""
    cache = NormCache()
    assert float(cache.bound("op", NonNegative(lambda x: x, (3,))).value) == pytest.approx(1.0)
    assert float(cache.bound("op", NonNegative(lambda x: 5 * x, (3,))).value) == pytest.approx(5.0)


@pytest.mark.parametrize("name", GRADIENT_MAPS)
def test_cache_hit_carries_the_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_map = GRADIENT_MAPS[name]
    made = count_certificates(monkeypatch)
    cache, weight = NormCache(), linear_map.weight.clone().requires_grad_()
    with torch.no_grad():
        cache.bound(name, linear_map.with_weight(weight))
    (from_hit,) = torch.autograd.grad(cache.bound(name, linear_map.with_weight(weight)).value, weight)
    assert len(made) == 1
    (direct,) = torch.autograd.grad(spectral_norm_bound(linear_map.with_weight(weight)).value, weight)
    torch.testing.assert_close(from_hit, direct)


@pytest.mark.parametrize("name", GRADIENT_MAPS)
def test_cache_filled_in_inference_mode_serves_later_graphs(name: str, way: str) -> None:
    cache, linear_map = NormCache(), GRADIENT_MAPS[name]
    with torch.inference_mode():
        cache.bound(name, linear_map)
    weight = linear_map.weight.clone().requires_grad_()
    cache.bound(name, linear_map.with_weight(weight)).value.backward()
    assert weight.grad is not None


def test_cache_keeps_no_graph() -> None:
    cache, weight = NormCache(), randn(3, 4).requires_grad_()
    for _ in range(3):
        cache.bound("dense", Dense(weight * 2)).value.backward()
    assert weight.grad is not None


# Power iteration

ITERATED: dict[str, LinearMap] = GRADIENT_MAPS | {
    "pool": NonNegative(lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 5, 5), torch.float64)
}


@pytest.mark.parametrize("name", ITERATED)
def test_power_iteration_stays_below_and_converges(name: str) -> None:
    linear_map = ITERATED[name]
    truth, iteration = true_norm(linear_map), PowerIteration(linear_map)
    previous = 0.0
    for _ in range(30):
        estimate = iteration(linear_map, 1)
        assert isinstance(estimate, NormEstimate)
        value = float(estimate.value)
        assert previous * (1 - 1e-12) <= value <= truth * (1 + 1e-9)
        previous = value
    value = float(iteration.converge(linear_map, 1e-13, 5000).value)
    assert value == pytest.approx(truth, rel=1e-7)
    assert value <= truth * (1 + 1e-9)
    assert float(torch.linalg.vector_norm(iteration.u)) == pytest.approx(1.0)


def test_steps_add_up() -> None:
    dense = Dense(randn(5, 6))
    one_by_one, at_once = PowerIteration(dense), PowerIteration(dense)
    for _ in range(4):
        last = one_by_one(dense, 1)
    torch.testing.assert_close(last.value, at_once(dense, 4).value)
    torch.testing.assert_close(one_by_one.u, at_once.u)


def test_eval_mode_changes_nothing() -> None:
    dense = Dense(randn(5, 6))
    iteration = PowerIteration(dense).eval()
    start = iteration.u.clone()
    first, second = iteration(dense, 5).value, iteration(dense, 5).value
    assert torch.equal(first, second) and torch.equal(iteration.u, start)


def test_state_dict_round_trip() -> None:
    dense = Dense(randn(5, 6))
    trained, fresh = PowerIteration(dense), PowerIteration(dense)
    trained(dense, 7)
    assert set(trained.state_dict()) == {"u"}
    assert not torch.equal(fresh.u, trained.u)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.u, trained.u)
    assert torch.equal(fresh.eval()(dense, 1).value, trained.eval()(dense, 1).value)


def test_start_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    dense = Dense(randn(5, 6))
    state = torch.get_rng_state()
    first, second = PowerIteration(dense), PowerIteration(dense)
    other = PowerIteration(dense, torch.Generator().manual_seed(5))
    assert torch.equal(first.u, second.u) and not torch.equal(first.u, other.u)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", GRADIENT_MAPS)
def test_gradient_of_the_estimate(name: str) -> None:
    """At convergence it is the gradient of the singular value; before, that of ||A u|| at a fixed u."""
    linear_map = GRADIENT_MAPS[name]
    weight = linear_map.weight.clone().requires_grad_()
    iteration = PowerIteration(linear_map).eval()
    assert torch.autograd.gradcheck(
        lambda w: iteration(linear_map.with_weight(w), 0).value, weight, atol=1e-5, rtol=1e-5
    )
    estimate = iteration.converge(linear_map.with_weight(weight), 1e-15, 20000).value
    (ours,) = torch.autograd.grad(estimate, weight)
    truth = torch.linalg.svdvals(dense_matrix(linear_map.with_weight(weight)))[0]
    torch.testing.assert_close(ours, torch.autograd.grad(truth, weight)[0], atol=1e-5, rtol=1e-5)


def test_graph_survives_later_steps() -> None:
    """The buffer is overwritten in place; a graph of an earlier call must not notice."""
    weight = randn(3, 2, 3, 3).requires_grad_()
    conv = Conv(weight, (2, 5, 5))
    iteration = PowerIteration(conv)
    (iteration(conv, 1).value + iteration(conv, 1).value).backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_zero_and_tiny_weights(size: float, dtype: torch.dtype) -> None:
    weight = (size * randn(4, 5)).to(dtype).requires_grad_()
    dense = Dense(weight)
    iteration = PowerIteration(dense)
    estimate = iteration(dense, 50).value
    estimate.backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and iteration.u.isfinite().all()
    assert float(torch.linalg.vector_norm(iteration.u)) == pytest.approx(1.0)
    assert estimate.item() == pytest.approx(true_norm(dense), rel=1e-3, abs=0.0)


def test_nan_weights_are_reported_and_do_not_spoil_the_vector() -> None:
    weight = randn(4, 5)
    iteration = PowerIteration(Dense(weight))
    iteration(Dense(weight), 3)
    before = iteration.u.clone()
    assert iteration(Dense(weight.fill_(math.nan)), 3).value.isnan()
    assert torch.equal(iteration.u, before)


def test_wrong_input_shape_is_refused() -> None:
    iteration = PowerIteration(Dense(randn(5, 6)))
    with pytest.raises(InvalidInputError, match=r"\(6,\).*\(4,\)"):
        iteration(Dense(randn(5, 4)), 1)
    with pytest.raises(InvalidInputError):
        iteration.converge(Dense(randn(5, 4)))


def test_doctests() -> None:
    assert doctest.testmod(norms).failed == 0
