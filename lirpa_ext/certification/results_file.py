"""The file of a certification's results, one record a line: locked, resumed, and checked field by field when read.

A record is a dict: ``index``, ``label``, ``prediction``, ``clean_margin``, ``radius`` (largest certified eps, None if
unknown), ``message``, and ``levels``, one dict for each eps: ``eps``, ``status`` (certified, attacked, unknown, error),
``attack_margin`` (smallest margin found), ``masked`` (whether the attack never had a gradient, so that its failure is
no evidence of robustness), ``verified_margin`` (lower bound on the margin), ``message``. A number that is not finite
is None.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..errors import ResultsError
from ..reporting.files import acquire, release, unwritable
from .identity import agree

STATUSES = ("certified", "attacked", "unknown", "error")
Record = dict[str, Any]
Meta = dict[str, Any]
PathLike = str | os.PathLike[str]

_FORMAT = "lirpa-ext certification 1"
_HEADER = f'{{"format": "{_FORMAT}"'.encode()
# Entries of the meta data that may differ when a run is resumed, because the results do not depend on them.
_FREE = frozenset({"date", "device", "batch_size", "fallbacks"})
_KIND = {
    "text": (str,), "flag": (bool,), "list": (list,), "map": (dict,), "map?": (dict, type(None)),
    "whole": (int,), "whole?": (int, type(None)), "number": (int, float), "number?": (int, float, type(None)),
    "norm": (int, float, str),
}  # fmt: skip
# The fields that a file must have, and the kind (in `_KIND`) of each.
_META_FIELDS = {
    "method": "text", "options": "map", "norm": "norm", "eps": "list", "dtype": "text", "model": "text",
    "model_hash": "text", "samples": "whole", "attack": "map?", "radius": "flag",
}  # fmt: skip
_RECORD_FIELDS = {
    "index": "whole", "label": "whole", "prediction": "whole?", "clean_margin": "number?", "radius": "number?",
    "message": "text", "levels": "list",
}  # fmt: skip
_LEVEL_FIELDS = {
    "eps": "number", "status": "text", "attack_margin": "number?", "masked": "flag", "verified_margin": "number?",
    "message": "text",
}  # fmt: skip


class ResultsFile:
    """A results file that grows while a certification runs. JSON Lines: the meta data, then one record a line.

    The file is locked against other processes and threads from the construction of this object to `close`, or to the
    end of a ``with``.

    Args:
        path: The file; None keeps the records in memory only.
        meta: Meta data of the run.
        resume: Go on with an existing file, default True. False renames it to ``NAME.1`` (or .2, ...).

    Attributes:
        meta: Meta data; those of the existing file if the run goes on with it.
        records: Index of a sample -> its record.

    Raises:
        ResultsError: The file is corrupt, in use, cannot be written, or is of another model, data set or setting.
    """

    def __init__(self, path: PathLike | None, meta: Meta, resume: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.meta: Meta = json.loads(json.dumps({"format": _FORMAT} | meta, allow_nan=False))
        self.records: dict[int, Record] = {}
        self._lock: FileLock | None = None
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = acquire(self.path)
            if not self.path.exists():
                return
            if resume:
                self._resume(self.path)
            else:
                aside = (self.path.with_name(f"{self.path.name}.{number}") for number in itertools.count(1))
                self.path.rename(next(path for path in aside if not path.exists()))
        except OSError as error:
            self.close()
            raise unwritable(self.path, error) from error
        except ResultsError:
            self.close()
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock of the file."""
        release(self._lock)
        self._lock = None

    def append(self, records: list[Record]) -> None:
        """Add records; they are on disk when this returns.

        Raises:
            ResultsError: The file cannot be written.
        """
        lines = records if self.records else [self.meta, *records]
        self.records |= {record["index"]: record for record in records}
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def ordered(self) -> list[Record]:
        """The records so far, in the order of the data."""
        return [self.records[index] for index in sorted(self.records)]

    def _resume(self, path: Path) -> None:
        meta, records, size = read_results(path)
        names = sorted((meta.keys() | self.meta.keys()) - _FREE - {"outputs"}) if meta else []
        details = "; ".join(
            f"{name} is {meta.get(name)!r} there, {self.meta.get(name)!r} here"
            for name in names
            if meta.get(name) != self.meta.get(name)
        )
        if meta and not details and not _same_outputs(meta, self.meta):
            details = "the model of the same graph and weights gives other outputs now"
        if details:
            raise ResultsError(
                f"{path} holds results of another run: {details}. Give another path, or resume=False "
                "(--no-resume) to put that file aside and start anew."
            )
        if records:
            self.meta, self.records = meta, records
        os.truncate(path, size if records else 0)


def read_results(path: PathLike) -> tuple[Meta, dict[int, Record], int]:
    """Read a results file; an incomplete last line, left by a killed process, is ignored.

    Returns:
        Meta data (empty if their line is incomplete), records by index, and the size in bytes of the complete lines.

    Raises:
        ResultsError: A line is corrupt, or the file is no results file.
    """
    text = read_bytes(path)
    whole = text[: text.rfind(b"\n") + 1]
    first, *lines = whole.splitlines() or [text]
    meta: Meta = {}
    records: dict[int, Record] = {}
    if whole or not _HEADER.startswith(text[: len(_HEADER)]):
        meta = _parse_header(path, first)
    for number, line in enumerate(lines, 2):
        try:
            record = check_record(loads(line), meta)
            if record["index"] in records:
                raise ValueError(f"sample {record['index']} is there twice")
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"line {number} of {path} is corrupt ({error!r}). Remove it to have its sample computed "
                "again, or give another path."
            ) from error
        records[record["index"]] = record
    return meta, records, len(whole)


def _same_outputs(before: Meta, now: Meta) -> bool:
    if "outputs" not in now:
        return "outputs" not in before
    return agree(before.get("outputs"), now["outputs"], getattr(torch, now["dtype"]))


# --- Checks of what is read, field by field. They raise ValueError, KeyError or TypeError. ---


def _parse_header(path: PathLike, line: bytes) -> Meta:
    try:
        if not line.startswith(_HEADER):
            raise ValueError("the first line is not that of one")
        return check_meta(loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is no results file of lirpa-ext: {error}; give another path") from error


def loads(text: bytes) -> Any:
    """Read JSON, refusing NaN and infinity.

    Raises:
        ValueError: The text is no such JSON, or nested too deeply.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of a results file")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_meta(meta: Any) -> Meta:
    """The meta data as read from a file, checked.

    Raises:
        ValueError, KeyError, TypeError: A field is missing, of another type, or out of range.
    """
    _check_fields(meta, _META_FIELDS)
    if not float(meta["norm"]) >= 1:  # a ValueError as well if that is another word than inf
        raise ValueError(f"its norm is {meta['norm']!r}")
    if not meta["eps"] or not all(_is(eps, "number") for eps in meta["eps"]):
        raise ValueError(f"its eps are {meta['eps']!r}")
    return dict(meta)


def check_record(record: Any, meta: Meta) -> Record:
    """A record as read from a file, checked against the meta data.

    Raises:
        ValueError, KeyError, TypeError: A field is missing, of another type, or out of range.
    """
    _check_fields(record, _RECORD_FIELDS)
    if not 0 <= record["index"] < meta["samples"]:
        raise ValueError(f"sample {record['index']} is none of {meta['samples']}")
    for level in record["levels"]:
        _check_fields({"masked": False} | level if isinstance(level, dict) else level, _LEVEL_FIELDS)  # an older file
        if level["status"] not in STATUSES:
            raise ValueError(f"status {level['status']!r:.60} is unknown")
    if [level["eps"] for level in record["levels"]] != meta["eps"]:
        raise ValueError("its eps are not those of the first line")
    return dict(record)


def _check_fields(content: Any, fields: dict[str, str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"there is a {type(content).__name__} where an object belongs")
    for name, kind in fields.items():
        if not _is(content[name], kind):
            raise ValueError(f"{name} is {content[name]!r:.60}")


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a kind of `_KIND`; numbers must be finite, and a bool is no number."""
    if isinstance(value, bool):
        return kind == "flag"
    return isinstance(value, _KIND[kind]) and not (isinstance(value, int | float) and not _finite(value))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def read_bytes(path: PathLike) -> bytes:
    """The content of a file.

    Raises:
        ResultsError: The file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
