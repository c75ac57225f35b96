"""Random self-ensemble: Gaussian noise before every convolution.

X. Liu, M. Cheng, H. Zhang, C.-J. Hsieh: Towards robust neural networks via random self-ensemble, ECCV 2018.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from .bayesian import BayesianLayer
from .sampling import RandomLayer, seeded

__all__ = ["Noise", "NoiseDraw", "make_rse"]


class NoiseDraw:
    """One draw of standard normal noise, whose i-th row is the same for every batch.

    Args:
        seed: Seed of all rows.
        device: Device to draw on.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._drawn: dict[torch.Size, tuple[torch.Generator, Tensor]] = {}

    def like(self, x: Tensor) -> Tensor:
        """Noise of the shape, type and device of `x`; rows beyond those of all earlier batches are drawn now."""
        shape = x.shape[1:]
        if shape not in self._drawn:
            self._drawn[shape] = seeded(self.seed, self.device), torch.empty(0, *shape, device=self.device)
        generator, rows = self._drawn[shape]
        if len(rows) < len(x):
            more = [torch.randn(shape, generator=generator, device=self.device) for _ in range(len(x) - len(rows))]
            rows = torch.cat([rows, torch.stack(more)])
            self._drawn[shape] = generator, rows
        return rows[: len(x)].to(x)


class Noise(RandomLayer):
    """A layer that adds noise N(0, level^2) to every entry, independent for each sample of a batch and each draw.

    Args:
        level: Standard deviation in units of the layer's input, at least 0.

    Raises:
        InvalidInputError: `level` is negative or not finite.
    """

    def __init__(self, level: float) -> None:
        super().__init__()
        if not 0 <= level < math.inf:
            raise InvalidInputError(f"a noise level is a standard deviation, 0 or more, got {level}")
        self.level = level

    def draw(self, generator: torch.Generator) -> NoiseDraw:
        """Noise for any number of rows."""
        device = generator.device
        return NoiseDraw(int(torch.randint(2**62, (), generator=generator, device=device)), device)

    def held(self, x: Tensor, draws: Sequence[NoiseDraw]) -> Tensor:
        """`x` plus the noise of each block of rows, as in `RandomLayer.held`."""
        blocks = x.chunk(len(draws))
        return x + self.level * torch.cat([draw.like(block) for draw, block in zip(draws, blocks, strict=True)])

    def extra_repr(self) -> str:
        """The noise level, for the layer's printed form."""
        return f"level={self.level}"


def make_rse(model: nn.Module, init: float = 0.2, inner: float = 0.1) -> nn.Module:
    """A copy of a network with Gaussian noise before every convolution (Liu et al., 2018).

    Args:
        model: Any torch module, which is not changed.
        init: Noise level before the first convolution (in the order of ``model.modules()``), in units of the image;
            default 0.2, as in Lee (2021).
        inner: Noise level before each other convolution, in units of its input, default 0.1. A level of 0 adds no
            noise.

    Returns:
        The randomized network; a ``torch.nn.Sequential`` of noise and convolution replaces each convolution.

    Raises:
        InvalidInputError: A level is negative or not finite, both are 0, or the network has no convolution.

    Example:
        >>> make_rse(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)))[0][0]
        Noise(level=0.2)
    """
    made = nn.Sequential(copy.deepcopy(model))  # so that a single convolution has a place too
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in made.modules():
        for name, child in parent._modules.items():
            if child is not None and not isinstance(parent, RandomLayer) and _convolves(child):
                places.setdefault(child, []).append((parent, name))
    if not places:
        raise InvalidInputError(
            f"random self-ensemble puts noise before convolutions, and this {type(model).__name__} has none; "
            "make_adv_bnn takes dense networks too"
        )
    if init == inner == 0:
        raise InvalidInputError("both noise levels are 0: that is no randomized network")
    for position, (layer, parents) in enumerate(places.items()):
        noise = Noise(inner if position else init)
        for parent, name in parents:
            if noise.level:
                parent._modules[name] = nn.Sequential(noise, layer)
    return made[0]


def _convolves(layer: nn.Module) -> bool:
    return isinstance(layer.mean if isinstance(layer, BayesianLayer) else layer, nn.modules.conv._ConvNd)
