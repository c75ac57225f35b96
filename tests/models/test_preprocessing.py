"""What is put before a network: layouts, shapes and normalization, with eps in units of the raw image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.errors import DataError
from lirpa_ext.models.preprocessing import Normalization, Preprocessed, preprocessed


class Takes(nn.Module):
    """The identity of a network that says what it takes, as an imported one does."""

    def __init__(self, shape=None, layout="NCHW"):
        super().__init__()
        self.layout, self.batch_size = layout, None
        if shape is not None:
            self.input_shape = shape

    def forward(self, x):
        return x


FIRST, LAST = torch.rand(2, 3, 6, 5), torch.rand(2, 6, 5, 3)


@pytest.mark.parametrize(
    ("network", "x", "layout", "expected"),
    [
        (Takes((3, 6, 5)), FIRST, "auto", FIRST),
        (Takes((6, 5, 3)), FIRST, "auto", FIRST.permute(0, 2, 3, 1)),
        (Takes((6, 5, 3), "NHWC"), FIRST, "auto", FIRST.permute(0, 2, 3, 1)),
        (Takes((3, 6, 5)), LAST, "auto", LAST.permute(0, 3, 1, 2)),
        (Takes((6, 5, 3)), LAST, "auto", LAST),
        (Takes(), FIRST, "auto", FIRST),
        (Takes(), LAST, "auto", LAST.permute(0, 3, 1, 2)),
        (Takes(), FIRST, "NHWC", FIRST.permute(0, 2, 3, 1)),
        (Takes(), LAST, "NHWC", LAST),
        (Takes((90,), "flat"), FIRST, "auto", FIRST.flatten(1)),
        (Takes((90,), "flat"), LAST, "auto", LAST.permute(0, 3, 1, 2).flatten(1)),
        (Takes((90, 1)), FIRST, "NHWC", FIRST.permute(0, 2, 3, 1).reshape(2, 90, 1)),
        (Takes((1, 1, 90)), FIRST, "auto", FIRST.reshape(2, 1, 1, 90)),
    ],
)
def test_layouts(network, x, layout, expected):
    model = preprocessed(network, x.shape[1:], layout=layout)
    assert torch.equal(model(x), expected)
    assert (model is network) == (expected is x)


def test_normalization_is_per_channel_wherever_the_channels_are():
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    expected = (255 * FIRST - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for x in (FIRST, FIRST.permute(0, 2, 3, 1)):
        for network in (Takes((3, 6, 5)), Takes()):
            made = preprocessed(network, x.shape[1:], mean, std, 255.0)(x)
            torch.testing.assert_close(made, expected)
    one = preprocessed(Takes(), (3, 6, 5), [0.5], [2.0])(FIRST)
    torch.testing.assert_close(one, (FIRST - 0.5) / 2)
    torch.testing.assert_close(preprocessed(Takes(), (3, 6, 5), std=[2.0])(FIRST), FIRST / 2)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("method", ["IBP", "CROWN", "bcp-crown"])
def test_eps_is_in_units_of_the_raw_image(norm, method):
    """A linear network behind a normalization: the bound is the dual norm of the weights over the std."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 1)).double()
    model = preprocessed(network, (6, 5, 3), [0.1, 0.2, 0.3], [0.5, 1.0, 2.0], 255.0).double()
    x = LAST.double()
    lower, upper = BoundedModule(model, x).compute_bounds(
        x=(BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=0.01)),), method=method
    )
    std = torch.tensor([0.5, 1.0, 2.0]).double().view(3, 1, 1)
    weight = (network[1].weight.view(3, 6, 5) * 255 / std).flatten()
    reach = 0.01 * weight.norm(p=2 if norm == 2 else 1)
    torch.testing.assert_close(upper, model(x) + reach)
    torch.testing.assert_close(lower, model(x) - reach)


def test_bad_numbers_are_refused():
    with pytest.raises(DataError, match="do not fit"):
        Preprocessed(Takes((3, 6, 6)), (3, 6, 5))
    with pytest.raises(DataError, match="3 channels, mean 2"):
        Preprocessed(Takes(), (3, 6, 5), [0.1, 0.2], [1.0, 1.0])
    with pytest.raises(DataError, match="layout must be"):
        Preprocessed(Takes(), (3, 6, 5), layout="HWC")
    for arguments in (([0.1], [0.0]), ([math.nan], [1.0]), ([0.1], [math.inf]), ([0.1, 0.2], [1.0]), ([], [])):
        with pytest.raises(DataError):
            Normalization(*arguments)
    with pytest.raises(DataError, match="scale"):
        Normalization([0.0], [1.0], scale=0.0)
