"""Analyses of tightness and smoothness: each is a function that returns numbers, and a plot made from them.

Numbers are frozen dataclasses with `rows`, `table`, `summary` and `save` (`lirpa_ext.analysis.results`); plots share
one style (`lirpa_ext.analysis.plots`). `Smoothness` needs Lightning; the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .connectivity import CertifiedObjective, Connectivity, bezier, connect, plot_connectivity
from .landscape import Measures, SmoothnessTrace, plot_smoothness, smoothness

if TYPE_CHECKING:
    from .smoothness_callback import Smoothness

__all__ = [
    "CertifiedObjective",
    "Connectivity",
    "Measures",
    "Smoothness",
    "SmoothnessTrace",
    "bezier",
    "connect",
    "plot_connectivity",
    "plot_smoothness",
    "smoothness",
]


def __getattr__(name: str) -> Any:
    if name != "Smoothness":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..training import require_lightning

    require_lightning()
    from .smoothness_callback import Smoothness

    return Smoothness
