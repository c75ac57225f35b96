"""Every linear map against its dense float64 matrix."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_ext.domain import linear_maps
from lirpa_ext.domain.convolutions import Conv, ConvTranspose
from lirpa_ext.domain.linear_maps import Dense, LinearMap, NonNegative, Scale, WeightedMap, safe_sqrt
from lirpa_ext.errors import InvalidInputError


def dense_matrix(linear_map: LinearMap) -> Tensor:
    """(outputs, inputs) in float64: the images of the unit vectors as columns."""
    size = math.prod(linear_map.input_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *linear_map.input_shape)
    return linear_map.double()(basis).flatten(1).t()


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def conv(shape: tuple[int, ...], out: int, kernel: tuple[int, ...], *args: int) -> Conv:
    """args: stride, padding, dilation, groups."""
    groups = args[3] if len(args) == 4 else 1
    return Conv(randn(out, shape[0] // groups, *kernel), shape, *args)


def conv_transpose(shape: tuple[int, ...], out: int, kernel: tuple[int, ...], *args: int) -> ConvTranspose:
    """args: stride, padding, output_padding, dilation, groups."""
    groups = args[4] if len(args) == 5 else 1
    return ConvTranspose(randn(shape[0], out // groups, *kernel), shape, *args)


MAPS: dict[str, Callable[[], LinearMap]] = {
    "dense": lambda: Dense(randn(4, 6)),
    "dense-lead": lambda: Dense(randn(4, 6), lead_shape=(2, 3)),
    "scale": lambda: Scale(randn(3, 1, 1), (3, 2, 4)),
    "scale-full": lambda: Scale(randn(2, 5), (2, 5)),
    "scale-scalar": lambda: Scale(torch.tensor(-2.0, dtype=torch.float64), (2, 5)),
    "scale-duplicates": lambda: Scale(randn(3, 1, 1), (1, 2, 4)),
    "scale-more-dims": lambda: Scale(randn(3, 2, 1), (4,)),
    "avg-pool": lambda: NonNegative(lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 5, 6), torch.float64),
    "mean": lambda: NonNegative(lambda x: x.mean(2), (2, 5, 3), torch.float64),
    "sum": lambda: NonNegative(lambda x: x.sum((1, 2), keepdim=True), (2, 5), torch.float64),
    "pad": lambda: NonNegative(lambda x: F.pad(x, (1, 2)), (2, 3), torch.float64),
    "gather": lambda: NonNegative(lambda x: x[:, [0, 2, 2, 1]], (3, 2), torch.float64),
    "expand": lambda: NonNegative(lambda x: x.unsqueeze(1).expand(-1, 3, -1), (4,), torch.float64),
    "conv1d": lambda: conv((3, 9), 4, (3,), 2, 1),
    "conv3d": lambda: conv((2, 3, 4, 3), 2, (2, 3, 2), 1, 1),
    "conv-asymmetric": lambda: Conv(randn(2, 1, 4, 2), (1, 7, 8), (1, 3), (2, 0), (2, 1)),
    "conv-kernel-larger-than-map": lambda: conv((2, 3, 2), 3, (7, 5), 1, 3),
    "conv-kernel-1-padding-3": lambda: conv((1, 4, 4), 2, (1, 1), 2, 3),
    "conv-1x1-map": lambda: conv((3, 1, 1), 2, (3, 3), 1, 1),
    "conv-depthwise": lambda: conv((4, 5, 5), 8, (3, 3), 1, 1, 1, 4),
    "conv_transpose1d": lambda: conv_transpose((3, 5), 2, (4,), 2, 1, 1),
    "conv_transpose-groups": lambda: conv_transpose((4, 3, 4), 6, (3, 3), 2, 1, 1, 1, 2),
    "conv_transpose-extra": lambda: conv_transpose((2, 3, 4), 2, (3, 2), 1, 1, 1, 2),
    "conv_transpose-border": lambda: conv_transpose((1, 4, 4), 2, (3, 3), 3, 2, 2),
    "conv_transpose3d": lambda: conv_transpose((2, 2, 3, 2), 1, (2, 2, 3), 2, 0, 1),
} | {
    f"conv-s{s}-p{p}-d{d}-g{g}": lambda s=s, p=p, d=d, g=g: conv((4, 7, 6), 4, (3, 2), s, p, d, g)
    for s, p, d, g in itertools.product((1, 2, 3), (0, 1, 3), (1, 2), (1, 2, 4))
}


@pytest.fixture(params=list(MAPS.values()), ids=list(MAPS))
def linear_map(request: pytest.FixtureRequest) -> LinearMap:
    return request.param()


def test_call_and_shapes(linear_map: LinearMap) -> None:
    x = randn(3, *linear_map.input_shape)
    image = linear_map(x)
    assert image.shape == (3, *linear_map.output_shape)
    torch.testing.assert_close(image.flatten(1), x.flatten(1) @ dense_matrix(linear_map).t())


def test_adjoint(linear_map: LinearMap) -> None:
    y = randn(2, *linear_map.output_shape)
    x = linear_map.adjoint(y)
    assert x.shape == (2, *linear_map.input_shape)
    torch.testing.assert_close(x.flatten(1), y.flatten(1) @ dense_matrix(linear_map))


def test_abs(linear_map: LinearMap) -> None:
    magnitude, matrix = linear_map.abs(), dense_matrix(linear_map).abs()
    torch.testing.assert_close(dense_matrix(magnitude), matrix)
    y = randn(1, *linear_map.output_shape)
    torch.testing.assert_close(magnitude.adjoint(y).flatten(), y.flatten() @ matrix)


def test_row_norms(linear_map: LinearMap) -> None:
    truth = torch.linalg.vector_norm(dense_matrix(linear_map), dim=1).view(linear_map.output_shape)
    exact, cheap = (linear_map.row_norms(exact).expand(linear_map.output_shape) for exact in (True, False))
    assert (cheap >= truth * (1 - 1e-12)).all()
    if isinstance(linear_map, WeightedMap):
        torch.testing.assert_close(exact, truth)
    else:
        assert (exact >= truth * (1 - 1e-12)).all()


def test_schur_bound(linear_map: LinearMap) -> None:
    matrix = dense_matrix(linear_map).abs()
    torch.testing.assert_close(linear_map.schur_bound(), (matrix.sum(0).max() * matrix.sum(1).max()).sqrt())


@pytest.mark.parametrize("name", ["dense-lead", "scale-duplicates", "conv-s2-p1-d1-g2", "conv_transpose-groups"])
def test_gradients_in_the_weight(name: str) -> None:
    """All four operations, against finite differences."""
    original = MAPS[name]()
    assert isinstance(original, WeightedMap)
    x, y = randn(1, *original.input_shape), randn(1, *original.output_shape)

    def everything(weight: Tensor) -> list[Tensor]:
        changed = original.with_weight(weight)
        norms = [changed.row_norms(exact) for exact in (True, False)]
        return [changed(x), changed.adjoint(y), changed.abs()(x), changed.schur_bound(), *norms]

    assert torch.autograd.gradcheck(everything, original.weight.clone().requires_grad_())


@pytest.mark.parametrize("name", [name for name in MAPS if isinstance(MAPS[name](), WeightedMap)])
def test_zero_weights_have_zero_norms_and_finite_gradients(name: str) -> None:
    original = MAPS[name]()
    assert isinstance(original, WeightedMap)
    weight = torch.zeros_like(original.weight).requires_grad_()
    zero = original.with_weight(weight)
    total = zero.row_norms().sum() + zero.row_norms(exact=False).sum() + zero.schur_bound()
    total.backward()
    assert total == 0 and weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dense", "conv-s2-p1-d1-g2", "conv_transpose-groups", "scale"])
def test_row_norms_of_tiny_weights_do_not_underflow(name: str) -> None:
    """Squares of 1e-30 are 0 in float32; one large output must not hide the others."""
    original = MAPS[name]()
    assert isinstance(original, WeightedMap)
    weight = (original.weight * 1e-30).float()
    if name != "conv_transpose-groups":
        weight[0] = 1.0
    tiny = original.with_weight(weight)
    truth = torch.linalg.vector_norm(dense_matrix(tiny), dim=1).view(tiny.output_shape)
    torch.testing.assert_close(tiny.row_norms().double().expand(tiny.output_shape), truth, rtol=1e-5, atol=0.0)


def test_interior_row_norm_of_a_convolution_is_its_kernel_norm() -> None:
    layer = conv((2, 9, 9), 3, (3, 3), 1, 1)
    cheap = layer.row_norms(exact=False)
    assert cheap.shape == (3, 1, 1)
    torch.testing.assert_close(layer.row_norms()[:, 4:5, 4:5], cheap)
    torch.testing.assert_close(cheap[:, 0, 0], torch.linalg.vector_norm(layer.weight.flatten(1), dim=1))


def test_nonnegative_adjoint_is_differentiable_and_leaves_no_graph() -> None:
    pool = MAPS["avg-pool"]()
    y = randn(2, *pool.output_shape)
    assert not pool.adjoint(y).requires_grad
    assert torch.autograd.gradcheck(pool.adjoint, y.requires_grad_())
    with torch.no_grad():
        assert not pool.adjoint(y).requires_grad


def test_safe_sqrt() -> None:
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    safe_sqrt(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert safe_sqrt(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dense(torch.ones(3)),
        lambda: Conv(torch.ones(1, 1, 3, 3), (1, 4)),
        lambda: Conv(torch.ones(1, 2, 3, 3), (1, 4, 4)),
        lambda: Conv(torch.ones(1, 1, 3, 3), (1, 2, 2)),
        lambda: Conv(torch.ones(3, 1, 3, 3), (2, 4, 4), groups=2),
        lambda: Conv(torch.ones(1, 1, 3, 3), (1, 4, 4), stride=(1,)),
        lambda: ConvTranspose(torch.ones(2, 1, 3, 3), (1, 4, 4)),
        lambda: NonNegative(lambda x: x + 1, (3,)),
    ],
    ids=["dense-1d", "dims", "channels", "no-output", "groups", "stride", "transpose-channels", "affine"],
)
def test_bad_geometry_is_refused(make: Callable[[], LinearMap]) -> None:
    with pytest.raises(InvalidInputError):
        make()


def test_doctests() -> None:
    assert doctest.testmod(linear_maps).failed == 0
