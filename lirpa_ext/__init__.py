"""Certified robustness on auto_LiRPA: l2 balls and boxes propagated together, on any model it can trace."""

from __future__ import annotations

from . import _moved
from ._version import __version__
from .certification.certify import certify
from .certification.lipschitz import lipschitz
from .certification.report import Report
from .domain.perturbation import PerturbationLpNorm
from .engine import BoundedTensor
from .importer import ImportedModel, load_onnx
from .importer.inspection import Inspection, inspect_onnx
from .importer.torchvision_repair import repair_torchvision
from .module.bounded_module import BoundedModule
from .module.register import register, unregister
from .training.losses import certified_loss, fused_cross_entropy, mixed_loss, relu_stability_loss, worst_case_logits
from .verification.verify import Verdict, verify
from .verification.vnnlib import Specification, load_vnnlib

repair_torchvision()
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
