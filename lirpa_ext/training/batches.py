"""Batches whose order depends only on seed, epoch and step, so that a restarted run sees the same batches.

torch's DataLoader draws from a generator whose state is not saved: a run killed within an epoch cannot go on with the
next batch, and processes that share a batch augment it differently. `Batches` avoids it for images that fit in memory.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigError
from .augmentation import augment

_logger = logging.getLogger(__name__)
_EPOCHS = 1_000_003  # base of the mixed number (seed, epoch, step): more than the epochs or steps of any run


class Place:
    """Position of the next batch, and the methods that Lightning needs to resume a loader within an epoch.

    Lightning calls `set_epoch` before each epoch, and keeps `state_dict` in its checkpoints. `Batches` and `Resumable`
    are subclasses.

    Args:
        seed: Seed of everything that is drawn.

    Attributes:
        epoch: Number of the epoch.
        step: Number of the next batch in the epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = self.step = 0

    @property
    def sampler(self) -> Place:
        """The loader itself; Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the current epoch goes on where it is."""
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step of the next batch."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position saved by `state_dict`."""
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _value(self, number: int) -> int:
        """Seed for the draw of this number in the current epoch."""
        return ((self.seed * _EPOCHS + self.epoch) * _EPOCHS + number) % 2**64


class Batches(Place):
    """Shuffled, augmented batches of images in memory; of several processes, the share of one.

    Args:
        x: All images, (N, ...); (N, C, H, W) if they are augmented.
        y: All labels, (N,).
        batch_size: Samples in the joint batch of all processes; the last, smaller batch of an epoch is left out.
        seed: Seed of order and augmentation, default 0.
        augmentation: One of `AUGMENTATIONS`, default "none".
        rank: Number of this process, default 0.
        world: Number of processes, default 1; each gets a contiguous part of the joint batch.

    Raises:
        ConfigError: `batch_size` is below 1 or above N, or no multiple of `world`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int = 0,
        augmentation: str = "none",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 1 <= batch_size <= len(x):
            raise ConfigError(f"data.batch_size must lie between 1 and {len(x)}, the training images; got {batch_size}")
        if batch_size % world:
            raise ConfigError(f"data.batch_size {batch_size} is shared by {world} processes: make it a multiple")
        super().__init__(seed)
        self.x, self.y, self.batch_size, self.augmentation = x, y, batch_size, augmentation
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The remaining batches of the epoch: images (batch_size / world, ...) and labels."""
        order = torch.randperm(len(self.x), generator=self._generator(-1))
        share = self.batch_size // self.world
        while self.step < len(self):
            index = order[self.step * self.batch_size : (self.step + 1) * self.batch_size]
            x, y = augment(self.x[index], self.augmentation, self._generator(self.step)), self.y[index]
            self.step += 1
            yield x[self.rank * share :][:share], y[self.rank * share :][:share]

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._value(step + 1))


class Resumable(Place):
    """A user's DataLoader whose order depends only on seed and epoch, and which can be resumed within an epoch.

    The generators of the samplers are seeded at the start of an epoch, and those of torch, numpy and Python before each
    batch, so that a data set that draws (augments) in this process draws the same after a restart. A resumed epoch
    loads the batches that were done once more, and skips them.

    Args:
        loader: The DataLoader; its data set has a length.
        seed: Seed of everything that is drawn.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        super().__init__(seed)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The remaining batches of the epoch."""
        self._seed_all(0)
        parts = (self.loader, self.loader.sampler, self.loader.batch_sampler)
        inner = (getattr(part, "sampler", None) for part in parts)
        for part in {id(part): part for part in (*parts, *inner)}.values():
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(self._value(0))
            if callable(start := getattr(part, "set_epoch", None)):
                start(self.epoch)
        batches = iter(self.loader)
        for number in range(len(self.loader)):
            self._seed_all(number + 1)
            batch = next(batches)
            if number == self.step:
                self.step += 1
                yield batch

    def _seed_all(self, number: int) -> None:
        value = self._value(number)
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)


def resumable(loader: Any, seed: int) -> Any:
    """Make a loader resumable within an epoch, if possible; otherwise log a warning.

    Args:
        loader: The training loader.
        seed: Seed of everything that is drawn.

    Returns:
        A `DataLoader` wrapped in `Resumable`; any other loader as it is, resumable if it has ``state_dict`` and
        ``load_state_dict``.
    """
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        _logger.warning(
            "the training data come from a %s, which has no state_dict and load_state_dict: a run that is killed goes "
            "on from the end of an epoch, with whatever order the data then have",
            type(loader).__name__,
        )
        return loader
    if loader.persistent_workers:
        _logger.warning("what persistent workers draw at random is not the same after a restart; the order is")
    return Resumable(loader, seed)


class Parts:
    """Batches of images in order, without shuffling; the last batch may be smaller.

    Args:
        x: Images, (N, ...).
        y: Labels, (N,).
        batch_size: Samples in a batch.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)


def split(x: Tensor, y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split a data set at random into a training and a validation part.

    Args:
        x: Images, (N, ...).
        y: Labels, (N,); not read.
        count: Number of validation samples.
        seed: Seed of the draw.

    Returns:
        Indices of the training part, (N - count,), and of the validation part, (count,), ascending.

    Raises:
        ConfigError: There are not more than `count` samples.
    """
    if not 0 <= count < len(x):
        raise ConfigError(f"data.validation must be 0 or more and below {len(x)}, the images there are; got {count}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values
