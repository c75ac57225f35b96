"""Reader of CIFAR-10 and CIFAR-100 as their authors distribute them, in python or binary batches."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .arrays import Pair, as_tensors
from .reading import read_bytes, reading

_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
_TEN = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_IMAGE = 3 * 32 * 32


def find_cifar(path: Path, split: str) -> list[Path]:
    """Find the batch files of a split.

    Args:
        path: Folder of the batches, the folder around it, or a single batch.
        split: "train" or "test".

    Returns:
        All batches of the split, or the single one; empty if one is missing.
    """
    if path.is_file():
        known = path.name in (*_TEN["train"], *_TEN["test"]) or path.suffix == ".bin"
        return [path] if known else []
    for folder in (path / name for name in _FOLDERS):
        for names in (_TEN[split], [f"{name}.bin" for name in _TEN[split]], [f"{split}.bin"]):
            if all((folder / name).is_file() for name in names):
                return [folder / name for name in names]
        if (folder / "meta").is_file() and (folder / split).is_file():  # CIFAR-100
            return [folder / split]
    return []


def load_cifar(path: str | Path, split: str = "test") -> Pair:
    """Load CIFAR-10 or CIFAR-100 (fine labels) from python or binary batches.

    Args:
        path: Folder of the batches, the folder around it, or a single batch.
        split: "train" or "test" (default).

    Returns:
        x, float32 in [0, 1], (N, 3, 32, 32), and y, int64, (N,).

    Raises:
        DataError: A batch is missing, truncated, or holds something else.
    """
    batches = find_cifar(Path(path), split)
    if not batches:
        raise DataError(f"{path} holds no batches of CIFAR-10 or CIFAR-100 ({split})")
    parts = [_read_binary(batch) if batch.suffix == ".bin" else _read_pickle(batch) for batch in batches]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return as_tensors(x.reshape(-1, 3, 32, 32), y, str(path))


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3072) and labels (N,) of a binary batch: records of a label (CIFAR-100: coarse, fine) and an image."""
    content = np.frombuffer(read_bytes(path), np.uint8)
    labels = 1 if "batch" in path.name else 2
    if not content.size or content.size % (labels + _IMAGE):
        raise DataError(f"{path} is truncated: {content.size} bytes are no whole number of {labels + _IMAGE}")
    records = content.reshape(-1, labels + _IMAGE)
    return records[:, labels:], records[:, labels - 1].astype(np.int64)


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    source = io.BytesIO(read_bytes(path))
    with reading(path, "truncated or no CIFAR batch"):
        content = _Unpickler(source, encoding="bytes").load()
        x, y = content[b"data"], content[b"labels" if b"labels" in content else b"fine_labels"]
        if not isinstance(x, _Array) or x.value.dtype != np.uint8 or x.value.ndim != 2 or x.value.shape[1] != _IMAGE:
            raise ValueError(f"its data are no bytes of shape (N, {_IMAGE})")
        labels = y.value.tolist() if isinstance(y, _Array) else y
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise ValueError("its labels are no list of whole numbers")
        return x.value, np.array(labels, np.int64)


# --- A pickle can run code, and numpy trusts the shapes in a pickle. So it is read with classes of our own. ---


class _Type:
    """Takes the place of numpy.dtype in a pickle; only numbers of 1 to 8 bytes are allowed."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        self.order = "|"
        if not re.fullmatch("[uif][1248]", self.name):
            raise pickle.UnpicklingError(f"it has entries of type {self.name[:40]!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = ">" if order == ">" else "<"


class _Array:
    """Takes the place of numpy.ndarray in a pickle; its size must be that of the bytes in the file."""

    value: np.ndarray

    def __init__(self, *_: object) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        flat = np.frombuffer(data, np.dtype(kind.order + kind.name))
        self.value = flat.reshape(shape, order="F" if by_columns else "C")


def _encode(text: str, encoding: str) -> bytes:
    """Takes the place of _codecs.encode, by which Python 3 writes bytes into a pickle of an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes by {encoding[:40]!r}")
    return text.encode("latin1")


# The only names that a batch may refer to.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array, ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): _encode,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds arrays and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch of images has no use for")
        return _ALLOWED[module, name]
