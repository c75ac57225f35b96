"""How other packages add to the tables of this one: methods, rules, nodes, lowerings, losses, attacks, data, analyses.

`add` refuses a name that is taken. An installed package is found by its entry points of the group ``lirpa_ext``, each a
module or a function in one, which registers what the package brings:

    [project.entry-points.lirpa_ext]
    my_package = "my_package.extension"
"""

from __future__ import annotations

import importlib
import inspect
import logging
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import DataError, RegistrationError

Entry = TypeVar("Entry")

_logger = logging.getLogger(__name__)
_loaded: list[str] = []


def add(table: dict[str, Entry], what: str, name: str, entry: Entry, overwrite: bool = False) -> None:
    """Add an entry to a table.

    Args:
        table: From names to what they stand for.
        what: What an entry is, for the message: "method".
        name: Name of the entry.
        entry: The entry.
        overwrite: Replace one that exists.

    Raises:
        RegistrationError: The name is taken, or is none.
    """
    if not isinstance(name, str) or not name.strip():
        raise RegistrationError(f"a {what} needs a name, got {name!r}")
    if name in table and not overwrite:
        raise RegistrationError(f"{what} {name!r} exists already; pass overwrite=True to replace it")
    table[name] = entry


def load_extensions() -> None:
    """Let installed packages register what they bring, once. One that fails is told of and left out."""
    if _loaded:
        return
    _loaded.append("")  # what is loaded may ask for a table
    for point in entry_points(group="lirpa_ext"):
        try:
            found = point.load()
            if inspect.isroutine(found):
                found()
            _loaded.append(point.name)
        except Exception as error:  # of another package: whatever it raises, this one goes on
            _logger.error("the extension %s (%s) cannot be loaded: %s: %s",
                          point.name, point.value, type(error).__name__, error)  # fmt: skip


def load_object(path: str, what: str) -> Any:
    """What ``package.module:name`` names.

    Args:
        path: The name.
        what: What it is to be, for the message.

    Raises:
        DataError: There is no such module, or nothing of that name in it.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise DataError(
            f"{what} {path[:200]!r} cannot be loaded: {type(error).__name__}: {error}. It must be package.module:name, "
            "of a module in the current folder or an installed one"
        ) from error
