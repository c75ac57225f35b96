"""Extension by other packages, which add methods, rules, nodes, lowerings, losses, attacks, data sets and analyses.

`add` puts an entry into a table, and refuses a name that is taken. An installed package is found by its entry points of
the group ``lirpa_ext``; each is a module, or a function in one, that registers the entries of the package:

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
        table: Table, name -> entry, changed in place.
        what: Kind of the entries, such as "method", for the message.
        name: Name of the entry.
        entry: The entry.
        overwrite: Whether to replace an entry of this name, default False.

    Raises:
        RegistrationError: The name is taken, empty, or no string.
    """
    if not isinstance(name, str) or not name.strip():
        raise RegistrationError(f"a {what} needs a name, got {name!r}")
    if name in table and not overwrite:
        raise RegistrationError(f"{what} {name!r} exists already; pass overwrite=True to replace it")
    table[name] = entry


def load_extensions() -> None:
    """Load the entry points of installed packages, once per process; one that fails is logged and skipped."""
    if _loaded:
        return
    _loaded.append("")  # an extension that is being loaded may call this function again
    for point in entry_points(group="lirpa_ext"):
        try:
            found = point.load()
            if inspect.isroutine(found):
                found()
            _loaded.append(point.name)
        except Exception as error:  # the code of another package may raise anything
            _logger.error("the extension %s (%s) cannot be loaded: %s: %s",
                          point.name, point.value, type(error).__name__, error)  # fmt: skip


def load_object(path: str, what: str) -> Any:
    """Import the object that ``package.module:name`` names.

    Args:
        path: The name.
        what: What the object should be, such as "the data set", for the message.

    Raises:
        DataError: The module cannot be imported, or lacks the name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise DataError(
            f"{what} {path[:200]!r} cannot be loaded: {type(error).__name__}: {error}. It must be package.module:name, "
            "of a module in the current folder or an installed one"
        ) from error
