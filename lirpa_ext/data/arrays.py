"""Pairs of inputs and labels in memory, from whatever holds them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError

Pair = tuple[Tensor, Tensor]

UNREADABLE = (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, struct.error)


def gather(data: Any) -> Pair:
    """Inputs and labels of a whole data set, in memory.

    Args:
        data: (x, y) as tensors or arrays, a torch Dataset of such pairs, or a DataLoader or another iterable
            of batches of them.

    Returns:
        x, (N, ...), floating point, and y, (N,), whole numbers.

    Raises:
        DataError: There is no sample, x and y do not match, or what is iterated over are no pairs.
    """
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, Tensor | np.ndarray) for part in data)
    ):
        x, y = (torch.as_tensor(part) for part in data)
    else:
        batches = DataLoader(data, batch_size=256) if isinstance(data, Dataset) else data
        try:
            pairs = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches]
            x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True)) if pairs else (torch.empty(0),) * 2
        except Exception as error:  # whatever a user's data set raises
            raise DataError(
                f"{type(data).__name__} cannot be read as pairs of inputs and labels: {type(error).__name__}: "
                f"{error}. Give (x, y) tensors, a Dataset of (input, label), or a DataLoader."
            ) from error
    if len(x) != len(y):
        raise DataError(f"there are {len(x)} inputs and {len(y)} labels")
    if len(x) == 0:
        raise DataError("the data set is empty: there is nothing to certify")
    if not x.is_floating_point():
        raise DataError(f"inputs must be floating point, got {x.dtype}: scale them first, as in x / 255")
    return x, y


def load_arrays(source: str | Path) -> Pair:
    """Arrays from a ``.npz`` with x and y (or images and labels), or from two files, ``X.npy,Y.npy``.

    Args:
        source: The path, or both with a comma between.

    Returns:
        x, float32, of the shape that the file has, bytes scaled to [0, 1], and y, int64, (N,).

    Raises:
        DataError: A file is missing, corrupt, or of the wrong kind.
    """
    try:
        if "," in str(source):
            x, y = (np.load(part, allow_pickle=False) for part in str(source).split(","))
        else:
            with np.load(source, allow_pickle=False) as arrays:
                names = ("x", "y") if "x" in arrays else ("images", "labels")
                x, y = (arrays[name] for name in names)
    except UNREADABLE as error:
        raise DataError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
    return as_tensors(x, y, str(source))


def load_digits(split: str = "test", seed: int = 0) -> Pair:
    """scikit-learn's bundled handwritten digits, 1797 images of 8 x 8, a fifth of each class for testing.

    Args:
        split: "train" or "test".
        seed: Of the split.

    Returns:
        x, float32 in [0, 1], (N, 1, 8, 8), and y, int64, (N,).
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return as_tensors(x.reshape(-1, 1, 8, 8) / 16, y, "digits")


def as_tensors(x: np.ndarray, y: np.ndarray, source: str) -> Pair:
    """Arrays as tensors, checked: floats, or bytes that are scaled to [0, 1], and whole numbers."""
    if x.dtype.kind not in "fu" or (x.dtype.kind == "u" and x.dtype != np.uint8):
        raise DataError(f"{source}: inputs must be floats, or bytes to be scaled to [0, 1], got {x.dtype}")
    if y.dtype.kind not in "iu":
        raise DataError(f"{source}: labels must be whole numbers, got {y.dtype}")
    scaled = x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1)
    return gather((torch.from_numpy(scaled), torch.from_numpy(y.astype(np.int64))))
