"""Certified training: configuration, schedules, losses and networks by name, on Lightning's module and trainer.

`CertifiedClassifier`, `ImageData` and the functions of `lirpa_ext.training.runs` need Lightning; the rest does not.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError
from ..models.architectures import ARCHITECTURES, Network, build
from .batches import Batches
from .memory import keep_freed_memory
from .objectives import OBJECTIVES, Loss, Objective, Step, register_loss, register_objective
from .schedules import Decay, Ramp, Schedule

_OF_LIGHTNING = {
    "CertifiedClassifier": "module",
    "Evaluation": "module",
    "Optimizer": "module",
    "ImageData": "datamodule",
}

__all__ = [
    "ARCHITECTURES",
    "OBJECTIVES",
    "Batches",
    "CertifiedClassifier",
    "Decay",
    "Evaluation",
    "ImageData",
    "Loss",
    "Network",
    "Objective",
    "Optimizer",
    "Ramp",
    "Schedule",
    "Step",
    "build",
    "keep_freed_memory",
    "register_loss",
    "register_objective",
    "require_lightning",
]


def require_lightning() -> None:
    """Raise ConfigError, with the command to install them, unless Lightning and jsonargparse can be imported."""
    for name in ("lightning", "jsonargparse"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"training needs {name}, which cannot be imported ({error}): "
                "pip install lightning 'jsonargparse[signatures]' tensorboard"
            ) from error


def __getattr__(name: str) -> Any:
    if name not in _OF_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_lightning()
    return getattr(importlib.import_module(f".{_OF_LIGHTNING[name]}", __name__), name)
