"""Analyses of bounds, networks and training: each is a function that returns numbers, and a function that plots them.

Numbers are frozen dataclasses with ``rows``, ``table``, ``summary`` and ``save`` (`lirpa_ext.reporting.results`); plots
share one style (`lirpa_ext.reporting.plots`). ``lirpa-ext analyze`` runs the analyses that are registered in
`lirpa_ext.cli.task`. Only the callbacks need Lightning.
"""

from __future__ import annotations

from ..training import of_lightning
from ..training.trade_off import TradeOff, read_trade_off
from .activity import Activity, relu_activity
from .connectivity import CertifiedObjective, Connectivity, bezier, connect, plot_connectivity
from .curves import Curves, verified_curves
from .landscape import Measures, SmoothnessComparison, SmoothnessTrace, plot_smoothness, smoothness
from .lower_slopes import LowerSlopes, lower_slopes
from .outer import OuterBound, outer_bound
from .tightness import Tightness, tightness
from .traces import ActivityTrace, LipschitzTrace

_OF_LIGHTNING = {
    "LipschitzConstants": "callbacks",
    "ReluActivity": "callbacks",
    "Smoothness": "smoothness_callback",
}

__all__ = [
    "Activity",
    "ActivityTrace",
    "CertifiedObjective",
    "Connectivity",
    "Curves",
    "LipschitzConstants",
    "LipschitzTrace",
    "LowerSlopes",
    "Measures",
    "OuterBound",
    "ReluActivity",
    "Smoothness",
    "SmoothnessComparison",
    "SmoothnessTrace",
    "Tightness",
    "TradeOff",
    "bezier",
    "connect",
    "lower_slopes",
    "outer_bound",
    "plot_connectivity",
    "plot_smoothness",
    "read_trade_off",
    "relu_activity",
    "smoothness",
    "tightness",
    "verified_curves",
]

__getattr__ = of_lightning(__name__, _OF_LIGHTNING)
