"""The positive list of the engine's bounds: a bound by the engine is used only for nodes that are on the list.

The list is data, `positive_list.json`: by version of the engine and family of bounds, the kinds of nodes and their
configurations (`lirpa_ext.engine.configuration`) on which the contract suite attacked the engine's bounds and found
them to hold. `python tests/engine/make_list.py` runs the suite and writes the list of the engine that it runs on. An
engine of another version has an empty list: the package's own operators then bound everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import engine
from ..errors import UnsupportedNodeError
from .configuration import configuration, kind

PATH = Path(__file__).with_name("positive_list.json")

FAMILIES = {
    "interval": "interval arithmetic: IBP, and the boxes of CROWN-IBP",
    "backward": "the backward pass: CROWN-IBP, CROWN and alpha-CROWN",
    "forward": "the forward pass: the forward methods",
    "relaxation": "the linear relaxation of one node, read by this package's backward methods",
}

_BUILTIN = ("auto_LiRPA", "lirpa_ext")


class Gap(NamedTuple):
    """A node that the engine may not bound, because its configuration is not on the list.

    Attributes:
        name: Name of the node in the graph.
        kind: Name of the node's class.
        configuration: The node's configuration, or a text of what is wrong with the graph as a whole.
    """

    name: str
    kind: str
    configuration: str

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.kind}: {self.configuration})"


@cache
def engine_list() -> dict[str, dict[str, dict[str, frozenset[str]]]]:
    """The positive list: configurations by version of the engine, family of bounds, and kind of node."""
    table = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        version: {family: {name: frozenset(rows) for name, rows in kinds.items()} for family, kinds in families.items()}
        for version, families in table.items()
    }


def is_listed(node: Any, family: str, mode: str = "") -> bool:
    """Whether the engine's bounds of a family are known to hold for a node, by its kind and configuration.

    True for inputs, and for nodes of the user's own classes, whose soundness is the user's responsibility.

    Args:
        node: The node.
        family: One of `FAMILIES`.
        mode: As in `lirpa_ext.engine.configuration.configuration`.
    """
    if isinstance(node, engine.BoundInput) or _package(type(node)) not in _BUILTIN:
        return True
    listed = engine_list().get(engine.engine_version(), {}).get(family, {}).get(kind(node), frozenset())
    return bool(listed) and configuration(node, mode) in listed


def is_ours(node: Any, function: str) -> bool:
    """Whether a node's method is defined by a class that is not the engine's.

    A node of this package whose method calls the engine's own says so by its attribute `by_engine`.

    Args:
        node: The node.
        function: Name of the method, such as "interval_propagate".
    """
    giver = next((base for base in type(node).__mro__ if function in vars(base)), type(node))
    return _package(giver) != "auto_LiRPA" and not getattr(node, "by_engine", False)


def refusal(node: Any, family: str, method: str, reason: str) -> UnsupportedNodeError:
    """The error for a node that neither the positive list nor an operator of this package covers.

    Args:
        node: The node.
        family: One of `FAMILIES`.
        method: Name of the method, for the message.
        reason: Why this package cannot bound the node, for the message.

    Returns:
        The error, to be raised by the caller.
    """
    return UnsupportedNodeError(
        f"{method} cannot bound {Gap(node.name, kind(node), configuration(node))}: {reason}, and the {family} "
        f"bounds of auto_LiRPA {engine.engine_version()} are not known to hold there. Rewrite the operation "
        "with ones that docs/support.md lists, or add a rule with lirpa_ext.rules.register_rule"
    )


def gaps(nodes: Iterable[Any], family: str, mode: str = "", constants: bool = False) -> list[Gap]:
    """The nodes of a graph that are not on the list of a family, in the given order.

    Args:
        nodes: Nodes of the graph.
        family: One of `FAMILIES`.
        mode: As in `lirpa_ext.engine.configuration.configuration`.
        constants: Include nodes that are not perturbed: the engine's own BoundedModule bounds them too on 0.3, where
            this package's uses their value. Default False.
    """
    missing = [node for node in nodes if (node.perturbed or constants) and not is_listed(node, family, mode)]
    return [Gap(node.name, kind(node), configuration(node, mode)) for node in missing]


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
