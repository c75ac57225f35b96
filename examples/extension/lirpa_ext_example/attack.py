"""An attack: a random walk. The base class projects, scores and keeps the best point; an attack writes `run`."""

import torch

from lirpa_ext.attacks import Attack, register_attack


class Walk(Attack):
    """Gaussian steps of a tenth of the radius."""

    def __init__(self, steps=20):
        self.steps = steps

    def run(self, target):
        points = target.x
        for _ in range(self.steps):
            step = torch.randn(points.shape, generator=target.generator, dtype=points.dtype)
            points = target.project(points + 0.1 * target.eps * step)
            target.score(points)


register_attack("walk", Walk)
