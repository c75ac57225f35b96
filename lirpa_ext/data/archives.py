"""Readers of SVHN, STL-10 and Tiny-ImageNet in the files that their authors publish."""

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
_MOST_BYTES = 2**30  # limit on memory while scipy reads a file of SVHN; the images of the largest one have 225 MB


def find_svhn(folder: Path, split: str) -> Path | None:
    """The ``.mat`` file of a split of SVHN's cropped digits in a folder; None if it is not there."""
    path = folder / f"{split}_32x32.mat"
    return path if path.is_file() else None


def load_svhn(folder: str | Path, split: str = "test") -> Pair:
    """Load SVHN's cropped digits, ``train_32x32.mat`` or ``test_32x32.mat``.

    Args:
        folder: Folder of the files.
        split: "train" or "test" (default).

    Returns:
        x, float32 in [0, 1], (N, 3, 32, 32), and y, int64, (N,); the digit 0 is class 0 here, and 10 in the file.

    Raises:
        DataError: The file is missing or corrupt, or scipy, which reads it, is not installed.
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
    """The folder of STL-10's binary files of a split, this folder or one in it; None if they are not there."""
    places = (folder, folder / "stl10_binary")
    return next((place for place in places if (place / f"{split}_X.bin").is_file()), None)


def load_stl(folder: str | Path, split: str = "test") -> Pair:
    """Load STL-10 from ``train_X.bin`` and ``train_y.bin``, or ``test_X.bin`` and ``test_y.bin``.

    Args:
        folder: Folder of the files.
        split: "train" or "test" (default).

    Returns:
        x, float32 in [0, 1], (N, 3, 96, 96), and y, int64, (N,), from 0 on.

    Raises:
        DataError: A file is missing or truncated.
    """
    images, labels = (Path(folder) / f"{split}_{kind}.bin" for kind in "Xy")
    x, y = (np.frombuffer(read_bytes(path), np.uint8) for path in (images, labels))
    if x.size != len(y) * 3 * _STL_SIDE**2:
        raise DataError(f"{images} is truncated: {x.size} bytes for {len(y)} images of {3 * _STL_SIDE**2}")
    # The file stores the pixels of a channel column by column.
    x = np.ascontiguousarray(x.reshape(-1, 3, _STL_SIDE, _STL_SIDE).transpose(0, 1, 3, 2))
    return as_tensors(x, y.astype(np.int64) - 1, str(folder))


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder has the layout of Tiny-ImageNet."""
    return (folder / "wnids.txt").is_file()


def load_tiny_imagenet(folder: str | Path, split: str = "test", limit: int | None = None) -> Pair:
    """Load Tiny-ImageNet as published; classes are numbered in the order of ``wnids.txt``.

    Args:
        folder: Folder that contains ``wnids.txt``.
        split: "train", or "test" (default) for the published ``val`` part; the labels of the test part are not public.
        limit: Number of samples to take, default all. Training samples are taken from all classes in turn.

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
