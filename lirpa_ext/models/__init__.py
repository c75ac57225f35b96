"""Models: networks of the literature by name, models from files, and the preprocessing of raw images."""

from __future__ import annotations

from .architectures import ARCHITECTURES, Network, build
from .loading import load_model, save_model

__all__ = ["ARCHITECTURES", "Network", "build", "load_model", "save_model"]
