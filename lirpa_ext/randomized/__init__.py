"""Randomized networks: layers that draw at every call, one drawn network to hold on to, ensembles of many."""

from __future__ import annotations

from .sampling import RandomLayer, Sampled, is_randomized, predict, sample

__all__ = ["RandomLayer", "Sampled", "is_randomized", "predict", "sample"]
