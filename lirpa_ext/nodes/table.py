"""The table from ONNX operations to nodes of the graph, and functions that add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.scalar_functions import ScalarFunction, check_function
from ..errors import RegistrationError
from ..extensions import add
from ..rules import SetRule, check_table, register_rule
from ..rules.elementwise import Elementwise
from . import activations, matmul, operators, padding, powers, repairs, softmax, transcendental
from .relaxations import BoundScalar

_FAMILIES = (operators, repairs, padding, matmul, powers, transcendental, softmax, activations)

CUSTOM_OPS: dict[str, Any] = {}
for _family in _FAMILIES:
    CUSTOM_OPS |= _family.OPS

check_table({*vars(engine.bound_ops), *(name for _family in _FAMILIES for name in vars(_family))})


def register_node(op: str, node: type, rule: SetRule | None = None, overwrite: bool = False) -> None:
    """Add a class of nodes for an ONNX operation, and its rule.

    Args:
        op: ONNX operation with its domain, such as ``onnx::Relu`` or ``my_package::Bump``.
        node: Class of the node, a subclass of `lirpa_ext.engine.Bound`.
        rule: Rule of the class; None (default) for the node's interval arithmetic alone.
        overwrite: Replace an existing class or rule. Default False.

    Raises:
        RegistrationError: The operation has a class already, the class has a rule already, `node` is no subclass of
            `lirpa_ext.engine.Bound`, or `rule` is no `lirpa_ext.rules.SetRule`.
    """
    if not (isinstance(node, type) and issubclass(node, engine.Bound)):
        raise RegistrationError(f"the node of {op} is {node!r}, no class of lirpa_ext.engine.Bound")
    if rule is not None:
        register_rule(node.__name__, rule, overwrite)
    add(CUSTOM_OPS, "operation", op, node, overwrite)


def register_activation(
    name: str, function: ScalarFunction, exact: bool = False, overwrite: bool = False
) -> Callable[[Tensor], Tensor]:
    """Add an activation, a function of each entry, which all methods can then bound.

    Args:
        name: Name of the operation, such as ``Bump``.
        function: The function, with its derivative and the points at which the derivative turns. `check_function` tests
            these at points; the caller must know that no turn is missing.
        exact: Whether the function is computed without rounding. Default False.
        overwrite: Replace an existing activation. Default False.

    Returns:
        The function for use in models, (B, ...) -> (B, ...).

    Raises:
        RegistrationError: The name is taken, or the function disagrees with its derivative, turns or range.
    """
    check_function(function)

    def init(self: Any, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        BoundScalar.__init__(self, attr, inputs, output_index, options)
        self.__dict__.update(vars(function))

    node = type(f"Bound{name}", (type(function), BoundScalar), {"__init__": init})
    recorded = activations.recorded(name, function.value)
    register_node(f"lirpa_ext::{name}", node, Elementwise.of_function(exact), overwrite)
    return lambda x: recorded.apply(x) if torch.jit.is_tracing() else function.value(x)
