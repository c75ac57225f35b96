"""The rules of the ball-box domain: a table from the class name of an engine's node to its rule.

`linear`, `products`, `bilinear`, `elementwise`, `structure`, `maxima` and `pairs` fill the table; a node without one,
or whose rule declines, takes the engine's interval arithmetic and the ball around its box. `register_rule` adds one.
"""

from . import bilinear, elementwise, linear, maxima, pairs, products, structure  # noqa: F401  (they fill the table)
from .base import (
    RULES,
    Context,
    Rule,
    State,
    adjoint_and_bias,
    frobenius,
    propagate_node,
    register_rule,
    rows_times_constant,
)

__all__ = [
    "RULES",
    "Context",
    "Rule",
    "State",
    "adjoint_and_bias",
    "frobenius",
    "propagate_node",
    "register_rule",
    "rows_times_constant",
]
