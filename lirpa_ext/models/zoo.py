"""Networks by the names of Lee (2021, A.1, B.3.3, C.1), for images of any size and any number of classes.

S. Lee's dissertation (2021) describes them; 4C3F is from E. Wong et al. (2018), Small, Medium and Large are from
S. Gowal et al. (2018). Each is a plain torch module with the per-channel normalization inside, so that eps is in units
of the raw image. The networks of A.1 have no short names there; here they are called 3C2F (MNIST), VGG16 (CIFAR-10) and
6C1F (STL-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["ARCHITECTURES", "Residual", "zoo_network"]

Conv = tuple[int, int, int, int]  # output channels, kernel, stride, padding

# name -> (convolutions, widths of the hidden dense layers). Lee (2021) writes C(channels, kernel, stride, padding).
_PLAIN: dict[str, tuple[list[Conv], list[int]]] = {
    "4C3F": ([(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512, 512]),
    "6C2F": (
        [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
        [512],
    ),
    "8C2F": (
        [(64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0), (256, 3, 1, 1),
         (256, 4, 2, 0)],
        [256],
    ),
    "Small": ([(16, 4, 2, 0), (32, 4, 1, 0)], [100]),
    "Small*": ([(16, 4, 2, 0), (32, 4, 2, 0)], [100]),
    "Medium": ([(32, 3, 1, 0), (32, 4, 2, 0), (64, 3, 1, 0), (64, 4, 2, 0)], [512, 512]),
    "Large": ([(64, 3, 1, 0), (64, 3, 1, 0), (128, 3, 2, 0), (128, 3, 1, 0), (128, 3, 1, 0)], [512]),
    "Large*": ([(64, 3, 1, 0), (128, 3, 2, 0), (128, 3, 1, 0), (128, 3, 1, 0)], [512]),
    # The small net of the official BCP code's MNIST example, with padding.
    "2C2F": ([(16, 4, 2, 1), (32, 4, 2, 1)], [100]),
}  # fmt: skip

# name -> (activation, batch norm after convolutions, convolutions and poolings, widths of the hidden dense layers).
# MP and AP halve the sides. Lee (2021) says only "VGG-16": this is the usual one for CIFAR-10, the convolutions of
# K. Simonyan and A. Zisserman (2015) with batch norm and one dense layer, as in the official code of Adv-BNN.
_POOLED: dict[str, tuple[type[nn.Module], bool, list[Conv | str], list[int]]] = {
    "3C2F": (nn.LeakyReLU, False, [(32, 3, 1, 1), (64, 3, 1, 1), "MP", (128, 3, 1, 1), "MP"], [1024]),
    "VGG16": (
        nn.ReLU, True,
        [(width, 3, 1, 1) if width else "MP" for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0,
                                                            512, 512, 512, 0)],
        [],
    ),
    "6C1F": (
        nn.ReLU, True,
        [(32, 3, 1, 1), "MP", (64, 3, 1, 1), "MP", (128, 3, 1, 1), "MP", (256, 3, 1, 1), "MP", (256, 3, 1, 0),
         (512, 3, 1, 0), "AP"],
        [],
    ),
}  # fmt: skip

ARCHITECTURES = (*_PLAIN, *_POOLED, "WRN")


def zoo_network(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """A network of `ARCHITECTURES`.

    Args:
        name: Its name.
        shape: Shape of one image, (C, H, W).
        classes: Number of classes.

    Returns:
        Classifier, (B, C, H, W) -> (B, classes).

    Raises:
        ConfigError: The image is too small for the network.
    """
    if name in _PLAIN:
        return _plain_net(*_PLAIN[name], shape, classes)
    if name in _POOLED:
        return _pooled_net(*_POOLED[name], shape, classes)
    return _wide_residual(shape, classes)


def _plain_net(convolutions: Sequence[Conv], widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels, *sides = shape
    for out, kernel, stride, padding in convolutions:
        layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
        channels = out
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ConfigError(f"an image of shape {list(shape)} is too small for this network's convolutions")
    features = channels * math.prod(sides)
    layers.append(nn.Flatten())
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def _pooled_net(
    activation: type[nn.Module],
    batch_norm: bool,
    layout: Sequence[Conv | str],
    widths: Sequence[int],
    shape: Sequence[int],
    classes: int,
) -> nn.Module:
    layers: list[nn.Module] = []
    channels = shape[0]
    for part in layout:
        if isinstance(part, str):
            layers.append({"MP": nn.MaxPool2d, "AP": nn.AvgPool2d}[part](2))
            continue
        out, kernel, stride, padding = part
        norm = [nn.BatchNorm2d(out)] if batch_norm else []
        layers += [nn.Conv2d(channels, out, kernel, stride, padding), *norm, activation()]
        channels = out
    body = nn.Sequential(*layers, nn.Flatten())
    try:
        with torch.no_grad():
            features = body.eval()(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:  # an image smaller than a kernel
        raise ConfigError(f"an image of shape {list(shape)} is too small for this network: {error}") from error
    for width in widths:
        body.extend([nn.Linear(features, width), activation()])
        features = width
    return body.append(nn.Linear(features, classes))


class Residual(nn.Module):
    """Residual block ReLU(conv(ReLU(conv(x))) + shortcut(x)), without batch norm; the shortcut is a convolution.

    With stride 2 the first convolution has a 4 x 4 kernel and the shortcut 2 x 2, with stride 1 they have 3 x 3 and
    1 x 1.

    Args:
        channels: Channels of the input.
        out: Channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 2 + stride, stride, 1), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1)
        )
        self.shortcut = nn.Conv2d(channels, out, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, H / stride, W / stride)."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def _wide_residual(shape: Sequence[int], classes: int) -> nn.Module:
    """The WRN of Lee (2021): E. Wong et al.'s (2018) residual net of widths 16, 16, 32, 64 and a dense layer of 1000.

    Lee (2021) does not print the layers; these have the 4,214,850 parameters that Table 3.2 there states.
    """
    channels, height, width = shape
    if min(height, width) < 4 or height % 4 or width % 4:
        raise ConfigError(f"WRN takes images whose height and width are multiples of 4, got {list(shape)}")
    blocks = [Residual(16, 16, 1), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1), nn.ReLU(), *blocks, nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 1000), nn.ReLU(), nn.Linear(1000, classes),
    )  # fmt: skip
