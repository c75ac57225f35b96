"""Preprocessing of raw images as a part of the model, so that eps is in units of the raw image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

LAYOUTS = ("auto", "NCHW", "NHWC")
_CHANNELS = (1, 3, 4)


class Normalization(nn.Module):
    """Normalization (scale x - mean) / std of each channel.

    Args:
        mean: One number for each channel, or one for all channels.
        std: One positive number for each channel, or one for all channels.
        dims: Number of axes of the input, the batch axis included; default 4.
        scale: Factor by which the input is multiplied first, default 1. For a network of bytes, whose mean and std are
            in units of 0 to 255, it is 255.
        axis: Axis of the channels, default 1.

    Raises:
        DataError: A std or a scale that is not positive and finite, or numbers that do not pair up.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], dims: int = 4, scale: float = 1.0, axis: int = 1
    ) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise DataError(f"mean and std must be as many numbers each, got {mean} and {std}")
        if not all(math.isfinite(value) for value in mean) or not all(0 < v < math.inf for v in [*std, scale]):
            raise DataError(f"std and scale must be positive, all finite; got mean {mean}, std {std}, scale {scale}")
        shape = [1] * dims
        shape[axis] = -1
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalized inputs, of the shape of x."""
        return ((x if self.scale == 1 else self.scale * x) - self.mean) / self.std

    def extra_repr(self) -> str:
        """The scale, for the printed model; mean and std are buffers."""
        return f"scale={self.scale}"


class Preprocessed(nn.Module):
    """A network preceded by its preprocessing: raw images are normalized, and their axes moved and reshaped for it.

    The normalization is a part of the bounded model, and moving or reshaping entries keeps every lp norm, so that a
    certificate of this model holds for the raw image.

    Args:
        network: The network. `input_shape`, `layout` and `batch_size` of an `ImportedModel` are taken into account.
        sample_shape: Shape of one raw sample. An image is (C, H, W); it is (H, W, C) if its last axis, and not its
            first, has size 1, 3 or 4.
        mean: Per-channel mean, as in `Normalization`; default none.
        std: Per-channel standard deviation, as in `Normalization`; default none.
        scale: Factor of the raw image, as in `Normalization`; default 1.
        layout: Position of the channels in the network's input: "NCHW", "NHWC", or "auto" (default), which takes the
            layout of the imported file, and "NCHW" where it is unknown. A network of vectors gets the image's entries
            in that order.

    Raises:
        DataError: The shapes do not go together, or the numbers do not make a normalization.
    """

    def __init__(
        self,
        network: nn.Module,
        sample_shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: float = 1.0,
        layout: str = "auto",
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        shape = tuple(sample_shape)
        wanted = getattr(network, "input_shape", None)
        if wanted is not None and math.prod(wanted) != math.prod(shape):
            raise DataError(f"a sample of the data has shape {shape}, the network takes {wanted}: they do not fit")
        image, last = len(shape) == 3, _channels_last(shape)
        channels = shape[-1 if last else 0] if shape else 1
        self.normalization: nn.Module = nn.Identity()
        if mean is not None or std is not None or scale != 1:
            mean, std = mean or [0.0], std or [1.0]
            if image and {len(mean), len(std)} - {1, channels}:
                raise DataError(f"images have {channels} channels, mean {len(mean)} numbers and std {len(std)}")
            size = max(len(mean), len(std))
            mean, std = (values * size if len(values) == 1 else values for values in (list(mean), list(std)))
            self.normalization = Normalization(mean, std, len(shape) + 1, scale, -1 if last else 1)
        named = layout if layout != "auto" else getattr(network, "layout", "NCHW")
        wants_last = named == "NHWC" or (layout == "auto" and wanted is not None and _channels_last(wanted))
        self.permutation = None if not image or last == wants_last else (0, 2, 3, 1) if wants_last else (0, 3, 1, 2)
        moved = shape if self.permutation is None else tuple(shape[axis - 1] for axis in self.permutation[1:])
        self.reshaped = None if wanted is None or moved == tuple(wanted) else tuple(wanted)
        self.network = network
        self.batch_size = getattr(network, "batch_size", None)
        self.input_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network for raw samples, ``(B, *sample_shape)``."""
        x = self.normalization(x)
        if self.permutation is not None:
            x = x.permute(self.permutation)
        return self.network(x if self.reshaped is None else x.reshape(-1, *self.reshaped))

    def extra_repr(self) -> str:
        """Permutation and new shape, for the printed model."""
        return f"permutation={self.permutation}, reshaped={self.reshaped}"


def preprocessed(network: nn.Module, sample_shape: Sequence[int], *args: Any, **kwargs: Any) -> nn.Module:
    """Put the preprocessing of raw images before a network.

    Args:
        network: The network.
        sample_shape: Shape of one raw sample.
        *args: Further arguments of `Preprocessed`.
        **kwargs: Further arguments of `Preprocessed`.

    Returns:
        The `Preprocessed` network, in the mode of the network; or the network itself if there is nothing to do.

    Raises:
        DataError: As `Preprocessed`.
    """
    made = Preprocessed(network, sample_shape, *args, **kwargs).train(network.training)
    steps = (made.permutation, made.reshaped)
    return network if steps == (None, None) and isinstance(made.normalization, nn.Identity) else made


def _channels_last(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[-1] in _CHANNELS and shape[0] not in _CHANNELS
