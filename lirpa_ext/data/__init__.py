"""Data sets in memory: loaded by name, from files and folders, or gathered from tensors, Datasets and DataLoaders."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..extensions import add, load_extensions, load_object
from .archives import find_stl, find_svhn, is_tiny_imagenet, load_stl, load_svhn, load_tiny_imagenet
from .arrays import Pair, gather, load_arrays, load_digits
from .cifar import find_cifar, load_cifar
from .folders import load_idx, load_image_folder, looks_like_images

__all__ = [
    "DATA",
    "Pair",
    "gather",
    "load_arrays",
    "load_cifar",
    "load_data",
    "load_digits",
    "load_idx",
    "load_image_folder",
    "load_stl",
    "load_svhn",
    "load_tiny_imagenet",
    "names_a_function",
    "register_data",
]

DATA: dict[str, Callable[[str], Any]] = {"digits": load_digits}
"""Name -> function of a split ("train" or "test") that gives the data in a form that `gather` takes."""

SOURCES = (
    "digits or another registered name, module:function of a split, X.npz, X.npy,Y.npy, a folder of MNIST's IDX files, "
    "of CIFAR batches (python or binary), of SVHN, STL-10 or Tiny-ImageNet as published, or of images, a class a folder"
)


def load_data(source: str, split: str = "test", limit: int | None = None) -> Pair:
    """Load a data set by name or path.

    Args:
        source: ``digits`` or another name of `DATA`; ``package.module:function``, whose argument is the split; a
            ``.npz`` with x and y (or images and labels); ``X.npy,Y.npy``; a folder of MNIST's IDX files, of CIFAR-10 or
            CIFAR-100 batches, of SVHN's ``.mat`` files, STL-10's ``.bin`` files or Tiny-ImageNet as published, or of
            images, ``[SPLIT/]CLASS/NAME.png``; or a single CIFAR batch.
        split: "train" or "test" (default); sources without splits ignore it.
        limit: Number of samples to take from the start, default all.

    Returns:
        x, float32, (N, C, H, W) for images, and y, int64, (N,). Bytes are scaled to [0, 1]; arrays keep their shape. A
        registered or user's function determines dtypes itself.

    Raises:
        DataError: The source does not exist, or it is corrupt, truncated or empty.
    """
    if split not in ("train", "test"):
        raise DataError(f'split must be "train" or "test", got {split!r}')
    if limit is not None and limit < 1:
        raise DataError(f"limit must be positive, got {limit}: the data set would be empty")
    path = Path(source)
    load_extensions()
    if source in DATA or names_a_function(source):
        x, y = _call(source, split)
    elif not os.path.exists(path) and "," not in source:
        raise DataError(f"there is no {source[:200]!r}: give {SOURCES}")
    elif find_cifar(path, split):
        x, y = load_cifar(path, split)
    elif find_svhn(path, split):
        x, y = load_svhn(path, split)
    elif (stl := find_stl(path, split)) is not None:
        x, y = load_stl(stl, split)
    elif is_tiny_imagenet(path):
        x, y = load_tiny_imagenet(path, split, limit)
    elif path.is_dir() and looks_like_images(path, split):
        x, y = load_image_folder(path, split, limit)
    elif path.is_dir():
        x, y = load_idx(path, split)
    elif "," in source or path.suffix == ".npz":
        x, y = load_arrays(source)
    else:
        raise DataError(f"{source!r} is no data set: give {SOURCES}")
    return x[:limit], y[:limit]


def register_data(name: str, function: Callable[[str], Any], overwrite: bool = False) -> None:
    """Add a data set to `DATA`, so that `load_data` and the command line can name it.

    Args:
        name: Name of the data set.
        function: Function of ``split`` ("train" or "test") that returns (x, y), a Dataset, or a DataLoader.
        overwrite: Whether to replace a data set of this name, default False.

    Raises:
        RegistrationError: The name is taken.
    """
    add(DATA, "data set", name, function, overwrite)


def names_a_function(source: str) -> bool:
    """Whether a source is package.module:function, and not a path such as C:\\data."""
    module, colon, name = source.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _call(source: str, split: str) -> Pair:
    function = DATA[source] if source in DATA else load_object(source, "the data set")
    try:
        takes_split = "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no function, or one of C
        takes_split = False
    if not takes_split:
        raise DataError(f"{source!r} is no function of a `split`, which gives the data of it")
    try:
        data = function(split)
    except Exception as error:  # a user's code
        raise DataError(f"the data set {source!r} fails: {type(error).__name__}: {error}") from error
    return gather(data)
