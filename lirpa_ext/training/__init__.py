"""Certified training: configuration, schedules, losses and networks by name, on Lightning's module and trainer.

`CertifiedClassifier`, `ImageData` and the functions of `lirpa_ext.training.runs` need Lightning; the rest does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
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


def of_lightning(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` for names whose modules need Lightning: they are imported when first asked for.

    Args:
        package: Name of the package.
        places: Module, relative to the package, of each name.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        require_lightning()
        return getattr(importlib.import_module(f".{places[name]}", package), name)

    return find


__getattr__ = of_lightning(__name__, _OF_LIGHTNING)
