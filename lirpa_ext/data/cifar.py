"""CIFAR-10 and CIFAR-100 as their authors distribute them: python batches or binary ones."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .arrays import UNREADABLE, Pair, as_tensors

_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
_TEN = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_IMAGE = 3 * 32 * 32
# All that a batch of numpy arrays needs; anything else in a pickle could run code.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


def find_cifar(path: Path, split: str) -> list[Path]:
    """The batches of a split that lie in a folder, or one that is named; none if there are not all of them."""
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
    """CIFAR-10 or CIFAR-100 (fine labels) from python or binary batches.

    Args:
        path: The folder of the batches, or the one around it; or one batch.
        split: "train" or "test".

    Returns:
        x, float32 in [0, 1], (N, 3, 32, 32), and y, int64, (N,).

    Raises:
        DataError: They are not there, truncated, or hold something else.
    """
    batches = find_cifar(Path(path), split)
    if not batches:
        raise DataError(f"{path} holds no batches of CIFAR-10 or CIFAR-100 ({split})")
    parts = [_read_binary(batch) if batch.suffix == ".bin" else _read_pickle(batch) for batch in batches]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return as_tensors(x.reshape(-1, 3, 32, 32), y, str(path))


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label (CIFAR-100: coarse and fine) and an image, in bytes."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    labels = 1 if "batch" in path.name else 2
    if not content.size or content.size % (labels + _IMAGE):
        raise DataError(f"{path} is truncated: {content.size} bytes are no whole number of {labels + _IMAGE}")
    records = content.reshape(-1, labels + _IMAGE)
    return records[:, labels:], records[:, labels - 1].astype(np.int64)


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        x = np.asarray(content[b"data"], np.uint8)
        y = np.asarray(content[b"labels" if b"labels" in content else b"fine_labels"], np.int64)
        if x.ndim != 2 or x.shape[1] != _IMAGE:
            raise ValueError(f"its data has shape {x.shape}, not (N, {_IMAGE})")
    except (*UNREADABLE, pickle.UnpicklingError, TypeError, AttributeError, IndexError, MemoryError) as error:
        raise DataError(f"{path} is truncated or no CIFAR batch: {type(error).__name__}: {error}") from error
    return x, y


class _Unpickler(pickle.Unpickler):
    """Builds arrays and plain values, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch of images has no use for")
        return super().find_class(module, name)
