"""Data sets from files: CIFAR batches, image folders, and what is wrong with them."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from lirpa_ext import errors
from lirpa_ext.data import load_cifar, load_data, load_image_folder

RANDOM = np.random.default_rng(0)


def batch(count, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, 10, count).tolist()


@pytest.fixture
def python_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for index, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        x, y = batch(4, index)
        (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y, b"batch_label": b"one"}))
    return tmp_path


def test_python_batches(python_batches):
    x, y = batch(4)
    for source in (
        python_batches,
        python_batches / "cifar-10-batches-py",
        python_batches / "cifar-10-batches-py/test_batch",
    ):
        images, labels = load_data(str(source))
        assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and labels.tolist() == y
        # the planes of a record are red, green, blue, row by row
        assert images[1, 2, 3, 5] == pytest.approx(x[1, 2 * 1024 + 3 * 32 + 5] / 255)
    images, labels = load_data(str(python_batches), "train")
    assert len(images) == 20 and labels[4:8].tolist() == batch(4, 2)[1]
    assert len(load_data(str(python_batches), "train", limit=7)[0]) == 7


def test_binary_batches(tmp_path):
    x, y = batch(3)
    records = np.concatenate([np.array(y, np.uint8)[:, None], x], 1)
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    images, labels = load_data(str(tmp_path))
    assert labels.tolist() == y and images[2, 1, 0, 0] == pytest.approx(x[2, 1024] / 255)
    fine = np.concatenate([np.zeros((3, 1), np.uint8), np.array([[7], [99], [3]], np.uint8), x], 1)  # coarse, fine
    (tmp_path / "test.bin").write_bytes(fine.tobytes())
    assert load_data(str(tmp_path / "test.bin"))[1].tolist() == [7, 99, 3]
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(errors.DataError, match="truncated: 9218 bytes"):
        load_data(str(tmp_path))


def test_fine_labels_of_cifar_100(tmp_path):
    x, _ = batch(2)
    (tmp_path / "meta").write_bytes(b"")
    (tmp_path / "test").write_bytes(pickle.dumps({b"data": x, b"fine_labels": [99, 5], b"coarse_labels": [1, 2]}))
    assert load_data(str(tmp_path))[1].tolist() == [99, 5]


class Danger:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nothing", pickle.dumps(Danger()), pickle.dumps({b"data": RANDOM}), pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}),
        pickle.dumps({b"data": batch(4)[0], b"labels": batch(4)[1]})[:200],
    ],
)  # fmt: skip
def test_pickles_that_are_no_batches_are_refused_unopened(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(errors.DataError, match=r"test_batch is truncated or no CIFAR batch"):
        load_data(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def save(path, value, mode="RGB", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_image_folders(tmp_path):
    for i in range(3):
        save(tmp_path / "test" / "cat" / f"{i}.png", (255, i, 0))
    save(tmp_path / "test" / "dog" / "a.png", (0, 10, 255))
    save(tmp_path / "train" / "cat" / "x.png", (1, 2, 3))
    x, y = load_data(str(tmp_path))
    assert x.shape == (4, 3, 4, 5) and y.tolist() == [0, 1, 0, 0]  # classes take turns
    assert x[1, :, 0, 0].tolist() == pytest.approx([0, 10 / 255, 1])
    assert load_data(str(tmp_path), limit=2)[1].tolist() == [0, 1]
    assert len(load_data(str(tmp_path), "train")[0]) == 1
    assert len(load_image_folder(tmp_path / "test")[0]) == 4


def test_gray_images(tmp_path):
    save(tmp_path / "a" / "1.png", 51, "L")
    save(tmp_path / "b" / "1.png", 255, "L")
    x, _ = load_data(str(tmp_path))
    assert x.shape == (2, 1, 4, 5) and x[0, 0, 0, 0] == pytest.approx(0.2)
    save(tmp_path / "c" / "1.png", (1, 2, 3))
    assert load_data(str(tmp_path))[0].shape == (3, 3, 4, 5)


def test_bad_image_folders(tmp_path):
    save(tmp_path / "a" / "1.png", 51, "L")
    save(tmp_path / "b" / "1.png", 51, "L", (6, 4))
    with pytest.raises(errors.DataError, match=r"b/1\.png is 6x4, .*a/1\.png 5x4"):
        load_data(str(tmp_path))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:30])
    with pytest.raises(errors.DataError, match=r"b/1\.png is no image"):
        load_data(str(tmp_path))
    with pytest.raises(errors.DataError, match="no folders of images"):
        load_image_folder(tmp_path / "a")
    with pytest.raises(errors.DataError, match="no batches"):
        load_cifar(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match="holds neither"):
        load_data(str(tmp_path / "empty"))
    with pytest.raises(errors.DataError, match="limit"):
        load_data("digits", limit=0)


def test_svhn_counts_from_one_and_calls_zero_ten(tmp_path):
    scipy_io = pytest.importorskip("scipy.io", reason="SVHN's files are read by scipy")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy_io.savemat(tmp_path / "test_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [2]], np.uint8)})
    x, y = load_data(str(tmp_path))
    assert x.shape == (4, 3, 32, 32) and y.tolist() == [1, 0, 9, 2]
    assert x[2, 1, 5, 7] == pytest.approx(pixels[5, 7, 1, 2] / 255)
    content = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(content[:-300])
    with pytest.raises(errors.DataError, match="truncated"):
        load_data(str(tmp_path))


def test_stl_goes_column_by_column(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "train_X.bin").write_bytes(pixels.tobytes())
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 10]))
    x, y = load_data(str(tmp_path), "train")
    assert x.shape == (2, 3, 96, 96) and y.tolist() == [0, 9]
    assert x[1, 2, 5, 7] == pytest.approx(pixels[1, 2, 7, 5] / 255)
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 10, 3]))
    with pytest.raises(errors.DataError, match="truncated"):
        load_data(str(tmp_path), "train")


def test_tiny_imagenet_as_published(tmp_path):
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    random = np.random.default_rng(0)
    for wnid in ("n01", "n02"):
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        for index in range(2):
            image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            image.save(tmp_path / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    Image.fromarray(random.integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "val/images/val_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\n")
    x, y = load_data(str(tmp_path), "train")
    assert x.shape == (4, 3, 64, 64) and y.tolist() == [0, 1, 0, 1]
    x, y = load_data(str(tmp_path))  # gray among coloured ones
    assert x.shape == (1, 3, 64, 64) and y.tolist() == [1]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\t0\t9\t9\n")
    with pytest.raises(errors.DataError, match="no complete Tiny-ImageNet"):
        load_data(str(tmp_path))
