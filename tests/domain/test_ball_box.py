"""The ball-box set: its radii against their definitions, and their gradients."""

from __future__ import annotations

import torch

from lirpa_ext.domain.ball_box import BallBox, box_radius


def random_box(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(*shape, dtype=torch.float64, generator=generator)
    below, above = (torch.rand(*shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return center, center - below, center + above


def test_box_radius_is_the_distance_to_the_farthest_corner():
    center, lower, upper = random_box(3, 2)
    corners = torch.stack([torch.stack([a[:, 0], b[:, 1]], 1) for a in (lower, upper) for b in (lower, upper)])
    expected = (corners - center).norm(dim=2).amax(0)
    torch.testing.assert_close(box_radius(center, lower, upper), expected)


def test_gradient_of_box_radius():
    points = [end.requires_grad_() for end in random_box(4, 2, 3)]
    torch.autograd.gradcheck(box_radius, points)


def test_gradient_of_box_radius_of_a_point_is_zero():
    point = [torch.ones(2, 3, requires_grad=True) for _ in range(3)]
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(box_radius(*point).sum(), point))


def test_tightened_takes_the_smaller_radius_of_each_sample():
    center, lower, upper = random_box(2, 3)
    radii = box_radius(center, lower, upper)
    state = BallBox(center, radii * torch.tensor([0.5, 2.0]), lower, upper).tightened()
    torch.testing.assert_close(state.radius, radii * torch.tensor([0.5, 1.0]))
