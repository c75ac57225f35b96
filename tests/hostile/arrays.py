"""numpy's archives and MNIST's IDX files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np

from lirpa_ext.data import load_data as read  # noqa: F401


class Execute:
    """Leaves a file when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def header(descr, shape):
    """The head of a .npy, whatever it claims."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


X, Y = npy(np.zeros((4, 3), np.float32)), npy(np.zeros(4, np.int64))


def npz(change=bytes, method=zipfile.ZIP_DEFLATED, **members):
    """Maker of an archive; `change` damages its bytes."""

    def make(folder):
        path = folder / "data.npz"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in ({"x": X, "y": Y} | members).items():
                archive.writestr(f"{name}.npy", content(folder) if callable(content) else content)
        path.write_bytes(change(path.read_bytes()))
        return str(path)

    return make


def set_flag(offset, central, value):
    """Change the same field of every member, in its own header and in the directory."""

    def change(content):
        damaged = bytearray(content)
        for mark, place in ((b"PK\x03\x04", offset), (b"PK\x01\x02", central)):
            start = damaged.find(mark)
            while start >= 0:
                damaged[start + place] = value
                start = damaged.find(mark, start + 4)
        return bytes(damaged)

    return change


def whole(content):
    """Maker of a .npz with such bytes."""

    def make(folder):
        (folder / "data.npz").write_bytes(content)
        return str(folder / "data.npz")

    return make


def bomb(folder):
    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            file.write(header("<f4", (2**20, 1024)))
            for _ in range(64):
                file.write(bytes(2**24))
        archive.writestr("y.npy", Y)
    return str(folder / "data.npz")


def twice(folder):
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "data.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in (("x.npy", X), ("x.npy", header("<f4", (2**40,))), ("y.npy", Y)):
            archive.writestr(name, content)
    return str(folder / "data.npz")


def pair(x, y=Y, holes=0):
    """Maker of two .npy files; the first may go on with holes, which take no room on the disk."""

    def make(folder):
        (folder / "x.npy").write_bytes(x)
        (folder / "y.npy").write_bytes(y)
        if holes:
            os.truncate(folder / "x.npy", holes)
        return f"{folder / 'x.npy'},{folder / 'y.npy'}"

    return make


def pipe(name):
    def make(folder):
        os.mkfifo(folder / name)
        return str(folder / name)

    return make


def idx_bytes(*shape, data=None):
    size = int(np.prod(shape)) if data is None else data
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(size)


IMAGES, LABELS = idx_bytes(4, 2, 2), idx_bytes(4)


def idx(images=IMAGES, labels=LABELS, suffix=""):
    def make(folder):
        (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(images)
        (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(gzip.compress(labels) if suffix else labels)
        return str(folder)

    return make


def idx_bomb(folder):
    pack, zeros = zlib.compressobj(1, wbits=31), bytes(2**24)
    content = [
        pack.compress(idx_bytes(2**18, 64, 64, data=0)),
        *(pack.compress(zeros) for _ in range(64)),
        pack.flush(),
    ]
    return idx(b"".join(content), LABELS, ".gz")(folder)


NO_NPZ, NO_IDX = r"no \.npz that can be read", "truncated or no IDX file"
CASES = {
    "fine": (npz(), None),
    "shape-of-terabytes": (npz(x=header("<f4", (2**40,))), NO_NPZ),
    "shape-beyond-all-numbers": (npz(x=header("<f4", (2**62, 2**62))), NO_NPZ),
    "negative-shape": (npz(x=header("<f4", (-4, 3)) + bytes(48)), NO_NPZ),
    "shape-is-a-word": (npz(x=header("<f4", "abc")), NO_NPZ),
    "shape-is-a-flag": (npz(x=header("<f4", (True,)) + bytes(4)), NO_NPZ),
    "no-type": (npz(x=header(None, (4,))), NO_NPZ),
    "odd-type": (npz(x=header(["x"], (4,))), NO_NPZ),
    "other-version": (npz(x=b"\x93NUMPY\x09\x00" + bytes(80)), NO_NPZ),
    "header-of-gigabytes": (npz(x=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"(" * 100), NO_NPZ),
    "header-nested": (npz(x=b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000), NO_NPZ),
    "objects": (npz(x=npy(np.array([{}], object))), "Object arrays cannot be loaded"),
    "a-pickle-as-member": (npz(x=lambda folder: pickle.dumps(Execute(folder))), NO_NPZ),
    "records": (npz(x=npy(np.zeros(4, [("a", "f4")]))), "inputs must be floats, or bytes"),
    "no-array": (npz(x=b"hello", y=b"world"), "no arrays"),
    "a-scalar": (npz(x=npy(np.float32(1)), y=npy(np.int64(1))), "NaN|must be"),
    "labels-of-two-axes": (npz(y=npy(np.zeros((4, 2), int))), r"labels \(N,\)"),
    "labels-of-words": (npz(y=npy(np.array(list("abcd")))), "whole numbers"),
    "negative-labels": (npz(y=npy(np.full(4, -5))), "classes from 0 on"),
    "labels-beyond-int64": (npz(y=npy(np.full(4, 2**63, np.uint64))), "classes from 0 on"),
    "fewer-labels": (npz(y=npy(np.zeros(3, int))), "4 inputs and 3 labels"),
    "empty-axis": (npz(x=npy(np.zeros((4, 0), np.float32))), "axis of size 0"),
    "nan": (npz(x=npy(np.full((4, 3), np.nan, np.float32))), "NaN"),
    "beyond-float32": (npz(x=npy(np.full((4, 3), 1e300))), "beyond float32"),
    "bomb": (bomb, "far more than it has on the disk"),
    "two-members-of-a-name": (twice, NO_NPZ),
    "cut": (npz(lambda content: content[:-30]), NO_NPZ),
    "one-bit": (npz(lambda content: content.replace(bytes(48), bytes(47) + b"\1"), zipfile.ZIP_STORED), NO_NPZ),
    "encrypted": (npz(set_flag(6, 8, 1)), "encrypted"),
    "unknown-compression": (npz(set_flag(8, 10, 99)), NO_NPZ),
    "lzma-of-nonsense": (npz(lambda content: content[:60] + b"\xff" * 30 + content[90:], zipfile.ZIP_LZMA), NO_NPZ),
    "an-npy-by-another-name": (whole(X), NO_NPZ),
    "a-pickle": (lambda folder: whole(pickle.dumps(Execute(folder)))(folder), NO_NPZ),
    "nothing": (whole(b""), NO_NPZ),
    "a-pipe": (pipe("data.npz"), "no file"),
    "a-name-too-long": (lambda folder: "a" * 5000 + ".npz", "there is no"),
    "a-name-with-nul": (lambda folder: "a\0b.npz", "there is no"),
    "npy-of-terabytes": (pair(header("<f4", (2**38,))), r"no \.npy"),
    "npy-of-holes": (pair(header("<f4", (2**33,)), holes=2**35), "far more than it has on the disk"),
    "npy-that-is-an-archive": (lambda folder: f"{npz()(folder)},{npz()(folder)}", "archive"),
    "three-files": (lambda folder: "a.npy,b.npy,c.npy", "3 files"),
    "idx-fine": (idx(), None),
    "idx-shape-of-exabytes": (idx(idx_bytes(2**31, 2**31, 2**31, data=16)), NO_IDX),
    "idx-shorter": (idx(IMAGES[:-3]), NO_IDX),
    "idx-longer": (idx(IMAGES + b"1"), NO_IDX),
    "idx-without-axes": (idx(b"\0\0\x08\0" + b"1"), "0 axes"),
    "idx-of-255-axes": (idx(idx_bytes(*[1] * 255)), "255 axes"),
    "idx-images-of-one-axis": (idx(LABELS), "1 axes"),
    "idx-labels-of-two-axes": (idx(labels=idx_bytes(4, 1)), "2 axes"),
    "idx-of-floats": (idx(b"\0\0\x0d\3" + IMAGES[4:]), NO_IDX),
    "idx-of-no-image": (idx(idx_bytes(0, 2, 2), idx_bytes(0)), "empty"),
    "idx-of-no-pixel": (idx(idx_bytes(4, 0, 0)), "axis of size 0"),
    "idx-nothing": (idx(b""), NO_IDX),
    "idx-gzip-cut": (idx(gzip.compress(IMAGES)[:-9], suffix=".gz"), "truncated gzip"),
    "idx-gzip-and-more": (idx(gzip.compress(IMAGES) + b"junk", suffix=".gz"), "no valid gzip"),
    "idx-bomb": (idx_bomb, "far more than it has"),
    "idx-a-pipe": (pipe("t10k-images-idx3-ubyte"), "no data set|no file"),
}
