"""`Result`, the base class of what analyses return: numbers as rows, with a text table, a JSON and a CSV file."""

from __future__ import annotations

import json
import math
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ResultsError
from .files import make_folder, write_csv, write_whole

__all__ = ["FORMAT", "Result", "Row", "read_result", "text_table"]

Row = dict[str, Any]

FORMAT = "lirpa-ext analysis 1"


class Result(ABC):
    """Numbers of one analysis. A subclass is a frozen dataclass that implements `rows`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Squares(Result):
        ...     values: tuple[float, ...]
        ...
        ...     def rows(self):
        ...         return [{"x": x, "square": x * x} for x in self.values]
        >>> print(Squares((1.0, 1.5)).table())
        x    square
        1         1
        1.5    2.25
    """

    @abstractmethod
    def rows(self) -> list[Row]:
        """One dict for each row: plain numbers and strings, all rows with the same keys."""

    def details(self) -> list[Row]:
        """Rows of the single values behind `rows`, such as one for each sample; default none."""
        return []

    def summary(self) -> str:
        """The result in a sentence or two, also used as alt text of the plot; default ""."""
        return ""

    def table(self) -> str:
        """The rows as a text table."""
        return text_table(self.rows())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``PATH.json`` (format, name of the class, summary, rows) and ``PATH.csv`` (rows).

        The details, if there are any, go to ``PATH_details.csv``. A number that is not finite is null in JSON and empty
        in CSV.

        Args:
            path: Path of the files; its suffix is replaced, and its folder is made if needed.

        Raises:
            ResultsError: A file cannot be written.
        """
        rows, details = (
            [{k: _plain(v) for k, v in row.items()} for row in made] for made in (self.rows(), self.details())
        )
        content = {"format": FORMAT, "analysis": type(self).__name__, "summary": self.summary(), "rows": rows}
        make_folder(Path(path).parent)
        write_whole(Path(path).with_suffix(".json"), json.dumps(content, indent=1, allow_nan=False) + "\n")
        _write_csv(Path(path).with_suffix(".csv"), rows)
        if details:
            _write_csv(Path(path).with_name(f"{Path(path).with_suffix('').name}_details.csv"), details)


def read_result(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the JSON file of `Result.save`.

    Args:
        path: The file.

    Returns:
        Dict with format, analysis, summary and rows; None for a JSON file with other content.

    Raises:
        ResultsError: The file cannot be read, or is no JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}. Write it anew, or remove it") from error
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def text_table(rows: Sequence[Row]) -> str:
    """Rows as a text table: strings aligned left, numbers aligned right with four significant digits.

    Args:
        rows: Dicts with the same keys; the first row determines the columns.
    """
    if not rows:
        return ""
    names = list(rows[0])
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines = []
    for line in cells:
        parts = (
            cell.ljust(width) if word or not column else cell.rjust(width)
            for column, (cell, width, word) in enumerate(zip(line, widths, words, strict=True))
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    write_csv(path, list(rows[0]) if rows else [], rows)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) else str(value)


def _plain(value: Any) -> Any:
    """A value that JSON can hold: a number of numpy becomes one of Python, a number that is not finite None."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(float(value)) else None
