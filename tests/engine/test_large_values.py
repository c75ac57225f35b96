"""Activations of values far beyond any table that an engine keeps of them: every method holds."""

from __future__ import annotations

import math

import pytest
import torch
from soundness import assert_sound
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.errors import UnsupportedNodeError

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "atan": lambda: Arctangent(), "leaky": lambda: nn.LeakyReLU(0.1)}
METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN", "forward", "bcp", "bcp-crown", "slope:crown")


class Arctangent(nn.Module):
    def forward(self, x):
        return torch.atan(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bounds_hold_on_large_values(name, scale, method):
    model = nn.Sequential(nn.Linear(5, 6), ACTIVATIONS[name](), nn.Linear(6, 6)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    x = torch.randn(2, 5, dtype=torch.float64)
    graph = BoundedModule(model, x)
    for perturbation in (PerturbationLpNorm(1.0, 2), PerturbationLpNorm(0.3, math.inf), PerturbationLpNorm(1e-4, 2)):
        try:
            bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
        except UnsupportedNodeError:
            assert method == "forward"
            continue
        assert_sound(model, x, perturbation, bounds)
