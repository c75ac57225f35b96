"""A callback of Lightning's trainer that records how concentrated gradients are after each epoch."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ...errors import ConfigError
from ...randomized import is_randomized
from ...reporting.results import Row
from ...training.module import CertifiedClassifier
from ..callbacks import EveryEpoch
from .training import ConcentrationTrace, concentration_record

__all__ = ["GradientConcentration"]


class GradientConcentration(EveryEpoch):
    """Records the concentration of gradients after each epoch: ``concentration.json``, ``.csv`` and ``.png``.

    It is measured on the clean images of the epoch's last batch, each time with the same draws. In a configuration::

        trainer:
          callbacks:
            - class_path: lirpa_ext.analysis.studies.GradientConcentration

    The cost is `draws` gradients of `samples` images for each epoch.

    Args:
        draws: Gradients of each image, default 10.
        samples: Largest number of images, default 64.

    Raises:
        ConfigError: `draws` is below 2 or `samples` below 1; or, when training starts, the network is not randomized.
    """

    KIND = ConcentrationTrace

    def __init__(self, draws: int = 10, samples: int = 64) -> None:
        super().__init__()
        if draws < 2 or samples < 1:
            raise ConfigError(
                f"GradientConcentration takes draws of 2 or more and samples of 1 or more, got {draws} and {samples}"
            )
        self.draws, self.samples = draws, samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module that is trained.

        Raises:
            ConfigError: The module is no `CertifiedClassifier`, or its network is not randomized.
        """
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, CertifiedClassifier)
        if not is_randomized(pl_module.model):
            raise ConfigError("GradientConcentration records a randomized network, and this one draws nothing")

    def measured(self, module: CertifiedClassifier, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Row]:
        """Concentration of the gradients, see `lirpa_ext.analysis.studies.training.concentration_record`."""
        generator = torch.Generator().manual_seed(module.seed)
        return [concentration_record(model, x[: self.samples], y[: self.samples], self.draws, generator)]
