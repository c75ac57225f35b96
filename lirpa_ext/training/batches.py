"""Batches in an order that depends on the seed, the epoch and the step alone, whoever asks and after whichever restart.

torch's DataLoader draws from a generator that nobody saves: a run killed within an epoch cannot go on with the batch
that came next, and processes that share a batch augment it differently. Images that fit in memory need none of it.
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
_EPOCHS = 1_000_003  # seed of (seed, epoch, step), far from each other


class Place:
    """Where the next batch is: what Lightning asks of a loader that goes on within an epoch.

    Lightning calls `set_epoch` before each epoch, and keeps `state_dict` in its checkpoints.

    Args:
        seed: Of what is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = self.step = 0

    @property
    def sampler(self) -> Place:
        """Itself: Lightning looks for `set_epoch` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; within the same one, stay."""
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where `state_dict` was taken."""
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _value(self, number: int) -> int:
        """Seed of something that is drawn in this epoch."""
        return ((self.seed * _EPOCHS + self.epoch) * _EPOCHS + number) % 2**64


class Batches(Place):
    """One process's share of shuffled, augmented batches.

    Args:
        x: All images, (N, ...).
        y: All labels, (N,).
        batch_size: Samples of the joint batch of all processes; the last, smaller batch of an epoch is left out.
        seed: Of order and augmentation.
        augmentation: One of `AUGMENTATIONS`.
        rank: Of this process.
        world: Number of processes; each gets a contiguous part of the joint batch.

    Raises:
        ConfigError: `batch_size` is above N, or no multiple of `world`.
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
        """Steps of an epoch."""
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch."""
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
    """A DataLoader of the user's, in an order that depends on seed and epoch, which can go on within an epoch.

    Its samplers' generators are seeded at the start of an epoch, and torch's, numpy's and Python's before each batch:
    a data set that draws (augments) in this process draws the same again. After a restart the batches that are done
    are loaded and left out.

    Args:
        loader: Of a data set with a length.
        seed: Of what is drawn.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        super().__init__(seed)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch."""
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
    """A loader that goes on where it was: a `DataLoader` as `Resumable`, one that has a state as it is.

    What cannot go on is told to the log.
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
    """Images in order, so many at a time, the last batch smaller.

    Args:
        x: Images, (N, ...).
        y: Labels, (N,).
        batch_size: How many.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)


def split(x: Tensor, y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation part, `count` samples drawn at random.

    Args:
        x: Images.
        y: Labels.
        count: Samples of the validation part.
        seed: Of the draw.

    Returns:
        Both in ascending order.

    Raises:
        ConfigError: There are not more than `count` samples.
    """
    if not 0 <= count < len(x):
        raise ConfigError(f"data.validation must be 0 or more and below {len(x)}, the images there are; got {count}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values
