"""Files that are whole or not there, and a lock that lets one process at a time write to a place."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..errors import ResultsError

__all__ = [
    "acquire", "locked", "make_folder", "release", "remove_parts", "replacing", "unwritable", "write_csv",
    "write_tensors", "write_whole",
]  # fmt: skip

_logger = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the ``with``, unless that ends with an error.

    Raises:
        ResultsError: It cannot be written: a full disk, a folder that is read-only or not there.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    special = target.exists() and not target.is_file()  # /dev/stdout
    part = target if special else target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        if not special:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(target)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if not special:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_whole(path: PathLike, content: bytes | memoryview | str) -> None:
    """Write a file, on disk before this returns; whoever is killed meanwhile leaves the file as it was.

    Raises:
        ResultsError: It cannot be written.
    """
    with replacing(path) as part:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_tensors(path: PathLike, content: Any) -> None:
    """Write what `torch.load` reads.

    Raises:
        ResultsError: The file cannot be written.
    """
    written = io.BytesIO()
    torch.save(content, written)
    write_whole(path, written.getbuffer())


def make_folder(path: PathLike) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        ResultsError: It cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one line a row, in the order of the columns; what a row lacks is left empty.

    Raises:
        ResultsError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def unwritable(path: PathLike, error: Exception) -> ResultsError:
    """The error of a file that cannot be written."""
    return ResultsError(f"{path} cannot be written: {error}. Free the disk, or give another path")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, see `acquire`."""
    lock = acquire(path)
    try:
        yield
    finally:
        release(lock)


def acquire(path: Path) -> FileLock | None:
    """Take the lock ``PATH.lock``; None where the file system has none.

    Raises:
        ResultsError: Another process or thread holds it.
    """
    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
        while not file.exists():  # another run took it away as it ended
            lock.release()
            lock.acquire()
    except Timeout as error:
        raise ResultsError(f"{path} is in use by another run; wait for its end, or give another path") from error
    except NotImplementedError:
        _logger.warning("%s is on a file system without locks: let no other run write to it", path)
        return None
    return lock


def release(lock: FileLock | None) -> None:
    """Give the lock back."""
    if lock is not None:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held; `acquire` looks for that
        lock.release()
