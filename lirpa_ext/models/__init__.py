"""Models: the zoo's by name, from files, and with what comes before them."""

from __future__ import annotations

from .architectures import ARCHITECTURES, Network, build
from .loading import load_model, save_model

__all__ = ["ARCHITECTURES", "Network", "build", "load_model", "save_model"]
