"""Certified robustness on auto_LiRPA: l2 balls and boxes propagated together, on any model that it can trace.

The names of ``__all__`` are imported from their folders on first use, and torch and the engine with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved, _torchvision
from ._version import __version__

if TYPE_CHECKING:
    from .certification.certify import certify
    from .certification.lipschitz import lipschitz
    from .certification.report import Report
    from .domain.perturbation import PerturbationLpNorm
    from .engine import BoundedTensor
    from .importer import ImportedModel, load_onnx
    from .importer.inspection import Inspection, inspect_onnx
    from .module.bounded_module import BoundedModule
    from .module.register import register, unregister
    from .training.losses import certified_loss, fused_cross_entropy, mixed_loss, relu_stability_loss, worst_case_logits
    from .verification.verify import Verdict, verify
    from .verification.vnnlib import Specification, load_vnnlib

_PLACES = {
    "certification.certify": ("certify",),
    "certification.lipschitz": ("lipschitz",),
    "certification.report": ("Report",),
    "domain.perturbation": ("PerturbationLpNorm",),
    "engine": ("BoundedTensor",),
    "importer": ("ImportedModel", "load_onnx"),
    "importer.inspection": ("Inspection", "inspect_onnx"),
    "module.bounded_module": ("BoundedModule",),
    "module.register": ("register", "unregister"),
    "training.losses": (
        "certified_loss", "fused_cross_entropy", "mixed_loss", "relu_stability_loss", "worst_case_logits",
    ),
    "verification.verify": ("Verdict", "verify"),
    "verification.vnnlib": ("Specification", "load_vnnlib"),
}  # fmt: skip
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

_torchvision.install()
_moved.install()

__all__ = [
    "BoundedModule",
    "BoundedTensor",
    "ImportedModel",
    "Inspection",
    "PerturbationLpNorm",
    "Report",
    "Specification",
    "Verdict",
    "__version__",
    "certified_loss",
    "certify",
    "fused_cross_entropy",
    "inspect_onnx",
    "lipschitz",
    "load_onnx",
    "load_vnnlib",
    "mixed_loss",
    "register",
    "relu_stability_loss",
    "unregister",
    "verify",
    "worst_case_logits",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, or a folder of the package, on first use."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
