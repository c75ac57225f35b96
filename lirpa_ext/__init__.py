"""Certified robustness on auto_LiRPA: l2 balls and boxes propagated together, on any model it can trace."""

from __future__ import annotations

from ._version import __version__
from .certify import certify
from .engine import BoundedTensor
from .importer import ImportedModel, load_onnx
from .inspection import Inspection, inspect_onnx
from .lipschitz import lipschitz
from .losses import certified_loss, fused_cross_entropy, mixed_loss, relu_stability_loss, worst_case_logits
from .module import BoundedModule
from .patch import register, unregister
from .perturbation import PerturbationLpNorm
from .report import Report
from .torchvision_repair import repair_torchvision
from .verify import Verdict, verify
from .vnnlib import Specification, load_vnnlib

repair_torchvision()

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
