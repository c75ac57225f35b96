"""Bound methods, in a table from name to function.

`base` defines the interface of a method and the table, `run` runs a method on a graph, `engine_methods` and
`substitutes` handle the engine's own methods, and each other file has one method or family of methods.
"""

from . import bcp, bcp_crown, cap, slopes  # noqa: F401  (they fill the table)
from .base import (
    METHODS,
    BoundOptions,
    BoundResult,
    Bounds,
    Graph,
    Method,
    Problem,
    check_options,
    check_specification,
    find_method,
    is_ours,
    known_methods,
    label_option,
    register_method,
)
from .bcp import LastLayer
from .relaxation import Relaxation
from .run import check_request, method_of, run_activation_bounds, run_last_layer, run_method

__all__ = [
    "METHODS",
    "BoundOptions",
    "BoundResult",
    "Bounds",
    "Graph",
    "LastLayer",
    "Method",
    "Problem",
    "Relaxation",
    "check_options",
    "check_request",
    "check_specification",
    "find_method",
    "is_ours",
    "known_methods",
    "label_option",
    "method_of",
    "register_method",
    "run_activation_bounds",
    "run_last_layer",
    "run_method",
]
