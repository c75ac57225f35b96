"""Files of data sets, whoever made them: read whole, but no more of them than they have on the disk, or fits easily."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError
from ..importer.reading import unpack

_FREE = 2**27  # bytes that any file may hold; MNIST's images are 47 MB, and as floats an array takes four times more
_RATIO = 32  # beyond that, of the bytes on the disk


def allowance(paths: Iterable[str | Path]) -> int:
    """Bytes that files may hold once unpacked, 128 MiB or 32 times what they take on the disk: a bomb asks for more.

    Raises:
        DataError: One is missing, or no file that can be read whole (a folder, a pipe, a device).
    """
    size = 0
    for path in map(str, paths):
        if not os.path.isfile(path):
            raise DataError(f"{path[:200]!r} is missing, or no file")
        status = os.stat(path)
        size += min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))  # less where it has holes
    return max(_FREE, _RATIO * size)


def check_size(path: str | Path, size: int, most: int) -> None:
    """Raise DataError if what a file holds is more than it may."""
    if size > most:
        raise DataError(
            f"{path} would take {size} bytes, over {most}, which is far more than it has on the disk: it is corrupt, "
            "or give it unpacked and in parts"
        )


def read_bytes(path: str | Path) -> bytes:
    """A whole file, unzipped if it is gzip.

    Raises:
        DataError: It is missing, truncated, or holds more than `allowance`.
    """
    most = allowance([path])
    check_size(path, os.path.getsize(path), most)
    return unpack(Path(path).read_bytes(), most, str(path))


@contextlib.contextmanager
def reading(path: str | Path, otherwise: str) -> Iterator[None]:
    """Where a file is taken apart: whatever that raises on a corrupt one becomes a DataError with its cause.

    Args:
        path: The file.
        otherwise: What it is then, "truncated or no IDX file".
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # numpy, zipfile, pickle, scipy and PIL raise whatever comes, MemoryError included
        cause = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{path} is {otherwise}: {type(error).__name__}: {cause}") from error


def check_inside(path: Path, folder: Path) -> None:
    """Raise DataError for a name, or a link, that leads out of the folder of a data set."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} leads out of {folder}: put a copy of the file in there")
