"""Safe reading of untrusted data files: limits on their unpacked size, and errors that name the cause."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError
from ..importer.reading import unpack

_FREE = 2**27  # bytes that any file may unpack to; MNIST's images have 47 MB, as float32 four times as much
_RATIO = 32  # a larger file may unpack to this multiple of its bytes on the disk


def allowance(paths: Iterable[str | Path]) -> int:
    """Largest allowed size of files once unpacked: 128 MiB, or 32 times their size on the disk if that is more.

    The limit refuses compressed files that would fill the memory.

    Args:
        paths: The files.

    Returns:
        Number of bytes, of all files together.

    Raises:
        DataError: A file is missing, or no regular file (a folder, a pipe, a device).
    """
    size = 0
    for path in map(str, paths):
        if not os.path.isfile(path):
            raise DataError(f"{path[:200]!r} is missing, or no file")
        status = os.stat(path)
        size += min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))  # a sparse file takes less
    return max(_FREE, _RATIO * size)


def check_size(path: str | Path, size: int, most: int) -> None:
    """Raise DataError if the unpacked `size` of a file is over `most` bytes (`allowance`)."""
    if size > most:
        raise DataError(
            f"{path} would take {size} bytes, over {most}, which is far more than it has on the disk: it is corrupt, "
            "or give it unpacked and in parts"
        )


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, unzipped if it is gzip.

    Raises:
        DataError: The file is missing, truncated, or unpacks to more than `allowance`.
    """
    most = allowance([path])
    check_size(path, os.path.getsize(path), most)
    return unpack(Path(path).read_bytes(), most, str(path))


@contextlib.contextmanager
def reading(path: str | Path, otherwise: str) -> Iterator[None]:
    """Context in which a file is parsed: any exception becomes a DataError with its cause.

    Args:
        path: The file.
        otherwise: What the file is if parsing fails, such as "truncated or no IDX file".

    Raises:
        DataError: Parsing fails.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # numpy, zipfile, pickle, scipy and PIL raise whatever comes, MemoryError included
        cause = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{path} is {otherwise}: {type(error).__name__}: {cause}") from error


def check_inside(path: Path, folder: Path) -> None:
    """Raise DataError if a path or the target of a link lies outside of the folder of a data set."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} leads out of {folder}: put a copy of the file in there")
