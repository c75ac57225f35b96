"""`BoundedModule`: a model as a graph, what is checked when it is built, and the guards on what it gives."""

from __future__ import annotations

from .bounded_module import BoundedModule
from .register import register, unregister

__all__ = ["BoundedModule", "register", "unregister"]
