"""Writing of files that are complete or do not change, and locks that let one process at a time write."""

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
    """Context that yields a temporary path, which replaces `path` at the end of the ``with`` if there is no error.

    Args:
        path: File to write; a link stays a link, and a device such as /dev/stdout is written to directly.

    Raises:
        ResultsError: The file cannot be written: the disk is full, or the folder is read-only or missing.
    """
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file()
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
    """Write a file; it is on disk when this returns, and unchanged if the process is killed before.

    Args:
        path: File to write.
        content: Bytes, or text, which is encoded as UTF-8.

    Raises:
        ResultsError: The file cannot be written.
    """
    with replacing(path) as part:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_tensors(path: PathLike, content: Any) -> None:
    """Write content, such as a state dict, in the format of ``torch.save``; the file is replaced as a whole.

    Raises:
        ResultsError: The file cannot be written.
    """
    written = io.BytesIO()
    torch.save(content, written)
    write_whole(path, written.getbuffer())


def make_folder(path: PathLike) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        ResultsError: The folder cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header and one line for each row; the file is replaced as a whole.

    Args:
        path: File to write.
        columns: Keys of the rows, in the order of the columns.
        rows: One mapping for each row; a missing key leaves the cell empty.

    Raises:
        ResultsError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def unwritable(path: PathLike, error: Exception) -> ResultsError:
    """The `ResultsError` for a file that cannot be written because of an error."""
    return ResultsError(f"{path} cannot be written: {error}. Free the disk, or give another path")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context that holds the lock of a file or folder, see `acquire`."""
    lock = acquire(path)
    try:
        yield
    finally:
        release(lock)


def acquire(path: Path) -> FileLock | None:
    """Acquire the lock ``PATH.lock``, without waiting.

    Args:
        path: The file or folder to lock; its folder must exist.

    Returns:
        The lock, for `release`; None if the file system has no locks, which logs a warning.

    Raises:
        ResultsError: Another process or thread holds the lock.
    """
    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
        while not file.exists():  # another run removed the lock file as it ended
            lock.release()
            lock.acquire()
    except Timeout as error:
        raise ResultsError(f"{path} is in use by another run; wait for its end, or give another path") from error
    except NotImplementedError:
        _logger.warning("%s is on a file system without locks: let no other run write to it", path)
        return None
    return lock


def release(lock: FileLock | None) -> None:
    """Release a lock of `acquire`, and remove its file; nothing happens for None."""
    if lock is not None:
        Path(lock.lock_file).unlink(missing_ok=True)  # removed while the lock is held; `acquire` checks for this
        lock.release()
