"""Data sets in the files that their authors publish: SVHN, STL-10 and Tiny-ImageNet."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..engine.limits import memory_limit
from ..errors import DataError
from .arrays import Pair, as_tensors
from .folders import read_images
from .reading import allowance, read_bytes, reading

_STL_SIDE = 96
_MOST_BYTES = 2**30  # for scipy to read SVHN's largest file, whose images are 225 MB


def find_svhn(folder: Path, split: str) -> Path | None:
    """The ``.mat`` file of a split of SVHN's cropped digits, if it is in the folder."""
    path = folder / f"{split}_32x32.mat"
    return path if path.is_file() else None


def load_svhn(folder: str | Path, split: str = "test") -> Pair:
    """SVHN's cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``.

    Args:
        folder: Where they are.
        split: "train" or "test".

    Returns:
        x, float32 in [0, 1], (N, 3, 32, 32), and y, int64, (N,), in which the file's 10 is 0.

    Raises:
        DataError: The file is missing or corrupt, or scipy, which reads it, is.
    """
    path = Path(folder) / f"{split}_32x32.mat"
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("SVHN's files are read by scipy: pip install scipy") from error
    allowance([path])
    with reading(path, "truncated or no SVHN file"), memory_limit(_MOST_BYTES):
        content = loadmat(str(path), variable_names=["X", "y"])
        x, y = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1).astype(np.int64)
        if x.dtype != np.uint8 or x.shape != (32, 32, 3, len(y)):
            raise ValueError(f"its X is {x.dtype} of shape {x.shape}, not bytes (32, 32, 3, {len(y)})")
    return as_tensors(np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y % 10, str(path))


def find_stl(folder: Path, split: str) -> Path | None:
    """The folder of STL-10's binary files, if they are there."""
    places = (folder, folder / "stl10_binary")
    return next((place for place in places if (place / f"{split}_X.bin").is_file()), None)


def load_stl(folder: str | Path, split: str = "test") -> Pair:
    """STL-10, ``train_X.bin``, ``train_y.bin`` and so on.

    Args:
        folder: Where they are.
        split: "train" or "test".

    Returns:
        x, float32 in [0, 1], (N, 3, 96, 96), and y, int64 from 0, (N,).

    Raises:
        DataError: A file is missing or truncated.
    """
    images, labels = (Path(folder) / f"{split}_{kind}.bin" for kind in "Xy")
    x, y = (np.frombuffer(read_bytes(path), np.uint8) for path in (images, labels))
    if x.size != len(y) * 3 * _STL_SIDE**2:
        raise DataError(f"{images} is truncated: {x.size} bytes for {len(y)} images of {3 * _STL_SIDE**2}")
    # Within a plane the file goes column by column.
    x = np.ascontiguousarray(x.reshape(-1, 3, _STL_SIDE, _STL_SIDE).transpose(0, 1, 3, 2))
    return as_tensors(x, y.astype(np.int64) - 1, str(folder))


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder is laid out as Tiny-ImageNet."""
    return (folder / "wnids.txt").is_file()


def load_tiny_imagenet(folder: str | Path, split: str = "test", limit: int | None = None) -> Pair:
    """Tiny-ImageNet as published: classes in the order of ``wnids.txt``; its ``val`` part is the test split here.

    Args:
        folder: That of ``wnids.txt``.
        split: "train" or "test"; the labels of the published test part are not public.
        limit: Only the first so many, of all classes in turn.

    Returns:
        x, float32 in [0, 1], (N, 3, 64, 64), and y, int64, (N,).

    Raises:
        DataError: A file is missing or corrupt.
    """
    root = Path(folder)
    with reading(root, "no complete Tiny-ImageNet"):
        classes = {name: label for label, name in enumerate((root / "wnids.txt").read_text().split())}
        if split == "train":
            found = [sorted((root / "train" / name / "images").glob("*.JPEG")) for name in classes]
            turns = zip_longest(*([(path, label) for path in paths] for label, paths in enumerate(found)))
            pairs = [pair for turn in turns for pair in turn if pair is not None]
        else:
            lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
            named = [line.split("\t")[:2] for line in lines if line]
            pairs = [(root / "val" / "images" / name, classes[wnid]) for name, wnid in named]
    if not pairs:
        raise DataError(f"{root} holds no {split} images")
    x = read_images([path for path, _ in pairs[:limit]], root)
    x = np.repeat(x, 3, 1) if x.shape[1] == 1 else x
    return as_tensors(x, np.array([label for _, label in pairs[:limit]]), str(root))
