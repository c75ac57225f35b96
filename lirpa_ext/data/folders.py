"""Images in folders: MNIST's IDX files, and one folder a class."""

from __future__ import annotations

import gzip
import struct
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..errors import DataError
from .arrays import UNREADABLE, Pair, as_tensors

_IDX_NAMES = {"train": "train", "test": "t10k"}
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


def load_idx(folder: str | Path, split: str = "test") -> Pair:
    """MNIST-like IDX files, ``train-images-idx3-ubyte[.gz]`` and so on.

    Args:
        folder: Where they are.
        split: "train" or "test".

    Returns:
        x, float32 in [0, 1], (N, 1, H, W), and y, int64, (N,).

    Raises:
        DataError: A file is missing, truncated or no IDX file.
    """
    stem = _IDX_NAMES[split]
    x, y = (_read_idx(Path(folder), f"{stem}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return as_tensors(x[:, None], y, str(folder))


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} holds neither {name} nor {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack(">HBB", content[:4])
        if zero != 0 or kind != 8:
            raise ValueError("it does not start like an IDX file of bytes")
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except UNREADABLE as error:
        raise DataError(f"{path} is truncated or no IDX file: {type(error).__name__}: {error}") from error


def looks_like_images(folder: Path, split: str) -> bool:
    """Whether a folder holds images in one folder a class."""
    return bool(_classes(folder, split))


def load_image_folder(folder: str | Path, split: str = "test", limit: int | None = None) -> Pair:
    """Images of one size in one folder a class, ``[SPLIT/]CLASS/NAME.png``.

    Classes are numbered in the order of their names, and take turns: so the first images are of every class.

    Args:
        folder: Where they are; a subfolder named after the split (for "test" also "val") is preferred.
        split: "train" or "test".
        limit: Only the first so many.

    Returns:
        x, float32 in [0, 1], (N, 1 or 3, H, W), and y, int64, (N,).

    Raises:
        DataError: There are none, one cannot be read, or they differ in size.
    """
    classes = _classes(Path(folder), split)
    if not classes:
        raise DataError(f"{folder} holds no folders of images")
    turns = zip_longest(*([(path, label) for path in paths] for label, paths in enumerate(classes)))
    chosen = [pair for turn in turns for pair in turn if pair is not None][:limit]
    images = [read_image(path) for path, _ in chosen]
    if any(image.ndim != images[0].ndim for image in images):  # gray ones among coloured ones
        images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images]
    for (path, _), image in zip(chosen, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, {chosen[0][0]} "
                f"{images[0].shape[1]}x{images[0].shape[0]}: bring all images to one size"
            )
    x = np.stack(images)
    x = x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return as_tensors(x, np.array([label for _, label in chosen]), str(folder))


def _classes(folder: Path, split: str) -> list[list[Path]]:
    """Images of each class, sorted by name; none where the folder holds anything else."""
    root = next((folder / name for name in _SPLITS[split] if (folder / name).is_dir()), folder)
    if not root.is_dir():
        return []
    classes = [
        sorted(p for p in c.iterdir() if p.suffix.lower() in _SUFFIXES) for c in sorted(root.iterdir()) if c.is_dir()
    ]
    return classes if classes and all(classes) else []


def read_image(path: Path) -> np.ndarray:
    """The bytes of an image file, (H, W) or (H, W, 3).

    Raises:
        DataError: It cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's own
        raise DataError(f"{path} is no image that can be read: {error}") from error
