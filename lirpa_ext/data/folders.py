"""Readers of MNIST's IDX files, and of images with one folder for each class."""

from __future__ import annotations

import struct
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..errors import DataError
from .arrays import Pair, as_tensors
from .reading import allowance, check_inside, check_size, read_bytes, reading

_IDX_NAMES = {"train": "train", "test": "t10k"}
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF")  # PIL runs programs for some others, such as EPS
_MOST_PIXELS = 2**24  # of an image


def load_idx(folder: str | Path, split: str = "test") -> Pair:
    """Load a data set in the format of MNIST: ``train-images-idx3-ubyte[.gz]`` and so on.

    Args:
        folder: Folder of the files.
        split: "train" or "test" (default), whose files begin with ``t10k``.

    Returns:
        x, float32 in [0, 1], (N, 1, H, W), and y, int64, (N,).

    Raises:
        DataError: A file is missing, truncated or no IDX file.
    """
    stem = _IDX_NAMES[split]
    x = _read_idx(Path(folder), f"{stem}-images-idx3-ubyte", 3)
    y = _read_idx(Path(folder), f"{stem}-labels-idx1-ubyte", 1)
    return as_tensors(x[:, None], y, str(folder))


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} holds neither {name} nor {name}.gz")
    content = read_bytes(path)
    with reading(path, "truncated or no IDX file"):
        zero, kind, rank = struct.unpack(">HBB", content[:4])
        if zero != 0 or kind != 8:
            raise ValueError("it does not start like an IDX file of bytes")
        if rank != axes:
            raise ValueError(f"it has {rank} axes, not {axes}")
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def looks_like_images(folder: Path, split: str) -> bool:
    """Whether a folder holds images of a split with one folder for each class."""
    return bool(_classes(folder, split))


def load_image_folder(folder: str | Path, split: str = "test", limit: int | None = None) -> Pair:
    """Load images of one size with one folder for each class, ``[SPLIT/]CLASS/NAME.png``.

    Classes are numbered in the order of their names. The samples are taken from all classes in turn.

    Args:
        folder: Folder of the images; a subfolder named after the split is preferred (for "test" also "val").
        split: "train" or "test" (default).
        limit: Number of images to take, default all.

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
    x = read_images([path for path, _ in chosen], Path(folder))
    return as_tensors(x, np.array([label for _, label in chosen]), str(folder))


def _classes(folder: Path, split: str) -> list[list[Path]]:
    """Image files of each class, sorted by name; empty unless every subfolder holds images."""
    root = next((folder / name for name in _SPLITS[split] if (folder / name).is_dir()), folder)
    if not root.is_dir():
        return []
    classes = [
        sorted(p for p in c.iterdir() if p.suffix.lower() in _SUFFIXES) for c in sorted(root.iterdir()) if c.is_dir()
    ]
    return classes if classes and all(classes) else []


def read_images(paths: list[Path], folder: Path) -> np.ndarray:
    """Read image files of one size.

    Args:
        paths: The files.
        folder: Folder of the data set, in which all files must lie.

    Returns:
        uint8, (N, 1, H, W) if all images are gray, else (N, 3, H, W).

    Raises:
        DataError: A file cannot be read, lies outside of the folder or has another size; or the images are enormous.
    """
    for path in paths:
        with reading(path, "no image that can be read"):
            check_inside(path, folder)
    images: list[np.ndarray] = []
    most = allowance(paths)
    for path in paths:
        images.append(_read_image(path))
        if images[-1].shape[:2] != images[0].shape[:2]:
            (height, width), (first_height, first_width) = images[-1].shape[:2], images[0].shape[:2]
            raise DataError(
                f"{path} is {width}x{height}, {paths[0]} {first_width}x{first_height}: bring all images to one size"
            )
        check_size(path.parent, sum(image.nbytes for image in images), most)
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images]
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return np.stack(images)[:, None]


def _read_image(path: Path) -> np.ndarray:
    """Pixels of an image file, uint8, (H, W) or (H, W, 3)."""
    from PIL import Image

    with reading(path, "no image that can be read"), Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"it is {image.width}x{image.height}, over {_MOST_PIXELS} pixels")
        return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
