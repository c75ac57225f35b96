"""The positive list of the engine's bounds: nothing of the engine's that is not on it is called a bound.

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
    """A node that the engine may not bound.

    Attributes:
        name: Name of the node in the graph.
        kind: Its class.
        configuration: Its configuration; or, in words, what of the graph is not on the list.
    """

    name: str
    kind: str
    configuration: str

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.kind}: {self.configuration})"


@cache
def engine_list() -> dict[str, dict[str, dict[str, frozenset[str]]]]:
    """Configurations by version, family and kind of node."""
    table = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        version: {family: {name: frozenset(rows) for name, rows in kinds.items()} for family, kinds in families.items()}
        for version, families in table.items()
    }


def is_listed(node: Any, family: str, mode: str = "") -> bool:
    """Whether a node's bounds of that family are known to hold, by its kind and configuration.

    A node of a class that is neither the engine's nor this package's is the user's own, and the user's promise.

    Args:
        node: The node.
        family: One of `FAMILIES`.
        mode: As in `configuration`.
    """
    if isinstance(node, engine.BoundInput) or _package(type(node)) not in _BUILTIN:
        return True
    listed = engine_list().get(engine.engine_version(), {}).get(family, {}).get(kind(node), frozenset())
    return bool(listed) and configuration(node, mode) in listed


def is_ours(node: Any, function: str) -> bool:
    """Whether the class that gives a node this function, such as "interval_propagate", is not the engine's.

    A node of ours that hands its operands on to the engine's own function, which it derives from, says so: `by_engine`.
    """
    giver = next((base for base in type(node).__mro__ if function in vars(base)), type(node))
    return _package(giver) != "auto_LiRPA" and not getattr(node, "by_engine", False)


def refusal(node: Any, family: str, method: str, reason: str) -> UnsupportedNodeError:
    """The error of a node that neither the engine's list nor an operator of this package covers."""
    return UnsupportedNodeError(
        f"{method} cannot bound {Gap(node.name, kind(node), configuration(node))}: {reason}, and the {family} "
        f"bounds of auto_LiRPA {engine.engine_version()} are not known to hold there. Rewrite the operation "
        "with ones that docs/support.md lists, or add a rule with lirpa_ext.rules.register_rule"
    )


def gaps(nodes: Iterable[Any], family: str, mode: str = "", constants: bool = False) -> list[Gap]:
    """The nodes of a graph that are not on the list of a family, in their order.

    Args:
        nodes: Nodes of the graph.
        family: One of `FAMILIES`.
        mode: As in `configuration`.
        constants: Ask of nodes that are not perturbed, too: the engine's own class bounds them on 0.3, where this
            package's takes their value.
    """
    missing = [node for node in nodes if (node.perturbed or constants) and not is_listed(node, family, mode)]
    return [Gap(node.name, kind(node), configuration(node, mode)) for node in missing]


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
