"""Random crops and flips of a batch, drawn from one generator, so that all processes augment alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError

AUGMENTATIONS = {"none": (0, False), "crop": (4, False), "crop-flip": (4, True)}
"""Name -> (zero padding before the crop to the original size, whether to flip left and right).

CIFAR-10 and Tiny-ImageNet are usually trained with "crop-flip", digits with "none".
"""


def check_augmentation(name: str) -> None:
    """Raise ConfigError unless the name is one of `AUGMENTATIONS`."""
    if name not in AUGMENTATIONS:
        raise ConfigError(f"unknown augmentation {name!r}: known are {', '.join(AUGMENTATIONS)}")


def augment(x: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, filling with zeros, and flip it left and right with probability 1/2.

    Args:
        x: Images, (B, C, H, W).
        name: One of `AUGMENTATIONS`.
        generator: Source of the draws.

    Returns:
        Images of the same shape.
    """
    padding, flip = AUGMENTATIONS[name]
    if padding:
        count, _, height, width = x.shape
        shifts = torch.randint(2 * padding + 1, (2, count), generator=generator)
        rows, columns = (
            shift[:, None] + torch.arange(side) for shift, side in zip(shifts, (height, width), strict=True)
        )
        padded = functional.pad(x, [padding] * 4)
        x = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        chosen = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(chosen[:, None, None, None], x.flip(3), x)
    return x.contiguous()
