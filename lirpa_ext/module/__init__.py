"""`BoundedModule`: a torch model as a graph whose outputs can be bounded, with checks of graph and bounds."""

from __future__ import annotations

from .bounded_module import BoundedModule
from .register import register, unregister

__all__ = ["BoundedModule", "register", "unregister"]
