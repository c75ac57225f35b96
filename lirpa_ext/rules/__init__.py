"""The rules of the ball-box domain, in one table from the class of a node to its rule (`table`).

`base` defines the kinds of rules, `applied` applies the rule of the table to a node, and each other file is a family of
rules. A node without a rule, or whose rule declines, takes the engine's interval arithmetic and the ball around the
resulting box. `register_rule` adds a rule.
"""

from .applied import adjoint_and_bias, frobenius, propagate_node, rows_times_constant
from .base import AffineRule, RelaxedRule, Rule, SetRule, State
from .context import Context
from .table import RULES, check_table, register_rule

__all__ = [
    "RULES",
    "AffineRule",
    "Context",
    "RelaxedRule",
    "Rule",
    "SetRule",
    "State",
    "adjoint_and_bias",
    "check_table",
    "frobenius",
    "propagate_node",
    "register_rule",
    "rows_times_constant",
]
