"""Pairs of inputs and labels in memory, from tensors, Datasets, DataLoaders and numpy files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .reading import allowance, check_size, reading

Pair = tuple[Tensor, Tensor]


def gather(data: Any) -> Pair:
    """Collect the inputs and labels of a whole data set in memory.

    Args:
        data: (x, y) as tensors or arrays, a torch Dataset of (input, label), or a DataLoader or another iterable of
            batches (inputs, labels).

    Returns:
        x, floating point, (N, ...), and y, (N,).

    Raises:
        DataError: There is no sample, x and y differ in length, x is not floating point, or the data are no pairs.
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
    """Load arrays from a ``.npz`` with x and y (or images and labels), or from two files, ``X.npy,Y.npy``.

    Args:
        source: Path of the ``.npz``, or two paths separated by a comma.

    Returns:
        x, float32, in the shape of the file, bytes scaled to [0, 1], and y, int64, (N,).

    Raises:
        DataError: A file is missing, corrupt, or of the wrong kind.
    """
    if "," in str(source):
        paths = str(source).split(",")
        if len(paths) != 2:
            raise DataError(f"{source} names {len(paths)} files: give two, X.npy,Y.npy")
        x, y = (_load_npy(path) for path in paths)
    else:
        x, y = _load_npz(source)
    return as_tensors(x, y, str(source))


def _load_npy(path: str) -> np.ndarray:
    most = allowance([path])
    check_size(path, Path(path).stat().st_size, most)
    with reading(path, "no .npy that can be read"):
        value = np.load(path, allow_pickle=False)
        if not isinstance(value, np.ndarray):
            raise ValueError("it is an archive, no .npy")
        return value


def _load_npz(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    most = allowance([path])
    with reading(path, "no .npz that can be read"):
        with zipfile.ZipFile(path) as archive:
            parts = {part.filename.removesuffix(".npy"): part.file_size for part in archive.infolist()}
        names = ("x", "y") if "x" in parts else ("images", "labels")
        check_size(path, sum(parts[name] for name in names), most)
        with np.load(path, allow_pickle=False) as arrays:
            values = [arrays[name] for name in names]
        if not all(isinstance(value, np.ndarray) for value in values):
            raise ValueError(f"its {' and '.join(names)} are no arrays")
        return values[0], values[1]


def load_digits(split: str = "test", seed: int = 0) -> Pair:
    """Load the handwritten digits of scikit-learn, 1797 images of 8 x 8, with a fifth of each class for testing.

    Args:
        split: "train" or "test" (default).
        seed: Seed of the split, default 0.

    Returns:
        x, float32 in [0, 1], (N, 1, 8, 8), and y, int64, (N,).

    Raises:
        DataError: scikit-learn is not installed.
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
    """Check arrays of inputs and labels, and convert them to tensors.

    Args:
        x: Inputs, (N, ...), finite floats, or bytes that are scaled to [0, 1].
        y: Labels, (N,), integers from 0 on.
        source: Name of the data set, for error messages.

    Returns:
        x, float32, and y, int64.

    Raises:
        DataError: A type, a shape or a value is wrong.
    """
    if x.dtype.kind not in "fu" or (x.dtype.kind == "u" and x.dtype != np.uint8):
        raise DataError(f"{source}: inputs must be floats, or bytes to be scaled to [0, 1], got {x.dtype}")
    if y.dtype.kind not in "iu":
        raise DataError(f"{source}: labels must be whole numbers, got {y.dtype}")
    if x.ndim == 0 or y.ndim != 1:
        raise DataError(f"{source}: inputs must be (N, ...) and labels (N,), got {x.shape} and {y.shape}")
    if 0 in x.shape[1:]:
        raise DataError(f"{source}: inputs of shape {x.shape} have an axis of size 0")
    if y.size and not 0 <= int(y.min()) <= int(y.max()) < 2**31:
        raise DataError(f"{source}: labels must be classes from 0 on, got {int(y.min())} to {int(y.max())}")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.divide(x, 255, dtype=np.float32) if x.dtype == np.uint8 else x.astype(np.float32)
    if x.dtype != np.uint8 and not np.isfinite(scaled).all():
        raise DataError(f"{source}: inputs have entries that are NaN, infinite or beyond float32")
    return gather((torch.from_numpy(scaled), torch.from_numpy(y.astype(np.int64))))
