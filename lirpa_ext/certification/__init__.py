"""Certified accuracy of a classifier on a data set: samples, results, reports; robust accuracy of random networks."""

from __future__ import annotations

from .report import Report
from .robust_accuracy import RobustAccuracy, evaluate

__all__ = ["Report", "RobustAccuracy", "evaluate"]
