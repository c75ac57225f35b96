"""Images of `lirpa_ext.data` as a LightningDataModule. Validation images are taken from the training split."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch import Tensor

from ..data import load_data
from ..errors import ConfigError
from .augmentation import check_augmentation
from .batches import Batches, Parts, split

__all__ = ["ImageData"]


class ImageData(LightningDataModule):
    """A data set in memory, in three parts for training, validation and test.

    Args:
        source: Data set as in `lirpa_ext.data.load_data`, a name, file or folder; default "digits".
        batch_size: Training samples in a step, of all processes together; default 128.
        validation: Samples taken from the training split to choose the checkpoint by, default 1000.
        limit: Number of samples of the training split to use, validation samples included; default all.
        test_limit: Number of samples of the test split to use, default all.
        augmentation: "none" (default), "crop" or "crop-flip".
        evaluation_batch: Samples at a time in validation and test, default 100.
        seed: Seed of the validation split, the order and the augmentation; default 0.

    Raises:
        ConfigError: A number out of range.
        DataError: At `setup`: the data are missing or corrupt.
    """

    def __init__(
        self,
        source: str = "digits",
        batch_size: int = 128,
        validation: int = 1000,
        limit: int | None = None,
        test_limit: int | None = None,
        augmentation: str = "none",
        evaluation_batch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_augmentation(augmentation)
        if validation < 1 or evaluation_batch < 1:
            raise ConfigError("data.validation and data.evaluation_batch must be 1 or more")
        self.source, self.batch_size, self.validation = source, batch_size, validation
        self.limit, self.test_limit, self.augmentation = limit, test_limit, augmentation
        self.evaluation_batch, self.seed = evaluation_batch, seed
        self.train_set: tuple[Tensor, Tensor] | None = None
        self.validation_set: tuple[Tensor, Tensor] | None = None
        self.test_set: tuple[Tensor, Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Load the data of a stage: the test split for "test", else the training and validation parts."""
        if stage == "test":
            self.test_set = load_data(self.source, "test", self.test_limit)
        elif self.train_set is None:
            x, y = load_data(self.source, "train", self.limit)
            train, validation = split(x, y, self.validation, self.seed)
            self.train_set, self.validation_set = (x[train], y[train]), (x[validation], y[validation])

    def train_dataloader(self) -> Batches:
        """Shuffled, augmented training batches; of several processes, the share of this one."""
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        rank, world = self._rank()
        return Batches(*self.train_set, self.batch_size, self.seed, self.augmentation, rank, world)

    def val_dataloader(self) -> Parts:
        """Validation batches; of several processes, the share of this one."""
        return self._loader(self.validation_set)

    def test_dataloader(self) -> Parts:
        """Test batches; of several processes, the share of this one."""
        return self._loader(self.test_set)

    def _loader(self, pair: tuple[Tensor, Tensor] | None) -> Parts:
        if pair is None:
            raise ConfigError("call setup of the data module first")
        rank, world = self._rank()
        x, y = pair
        return Parts(x[rank::world], y[rank::world], self.evaluation_batch)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
