"""CIFAR's batches, and the archives of SVHN and STL-10."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np

from lirpa_ext.data import load_data as read  # noqa: F401

from .arrays import Execute

GOOD = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
NO_BATCH = "truncated or no CIFAR batch"


def batch(content):
    """Maker of a pickled batch, from bytes or from what is pickled."""

    def make(folder):
        value = content(folder) if callable(content) else content
        (folder / "test_batch").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, 2))
        return str(folder)

    return make


def code(body):
    """Maker of a batch of these opcodes."""
    return batch(b"\x80\x02" + body + b".")


def files(**contents):
    """Maker of files of such bytes; a number stands for so many bytes that take no room on the disk."""

    def make(folder):
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(b"" if isinstance(content, int) else content)
            if isinstance(content, int):
                os.truncate(path, content)
        return str(folder)

    return make


def mat(**content):
    def make(folder):
        from scipy.io import savemat

        savemat(folder / "test_32x32.mat", content, do_compression=True)
        return str(folder)

    return make


def nested(depth=40):
    """A list that holds a list ten times, and so on: 10^40 numbers in 40 lists."""
    value = [1]
    for _ in range(depth):
        value = [value] * 10
    return value


# An array of objects whose type says that it holds none: numpy would take its bytes for pointers.
POINTERS = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
    b"U\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb"
)
V4 = struct.pack("<5i", 0, 2**30, 2**30, 0, 2) + b"X\0" + bytes(99)
CASES = {
    "fine": (batch(GOOD), None),
    "runs-code": (batch(Execute), "which a batch of images has no use for"),
    "names-a-builtin": (code(b"cbuiltins\neval\nU\x011\x85R"), "no use for"),
    "names-numpy's-loader": (code(b"cnumpy\nload\nU\x01a\x85R"), "no use for"),
    "encodes-by-another-codec": (code(b"c_codecs\nencode\nX\1\0\0\0aX\4\0\0\0zlib\x86R"), "encodes bytes by 'zlib'"),
    "array-of-pointers": (code(POINTERS), "entries of type 'O8'"),
    "array-without-bytes": (
        code(b"}(U\x04datacnumpy\nndarray\nJ\xff\xff\xff\x7fJ\x00\x0c\x00\x00\x86\x85RU\x06labels]u"), NO_BATCH
    ),
    "a-list": (batch([1, 2]), NO_BATCH),
    "no-labels": (batch({b"data": GOOD[b"data"]}), NO_BATCH),
    "labels-of-words": (batch(GOOD | {b"labels": ["a", "b"]}), "no list of whole numbers"),
    "labels-beyond-int64": (batch(GOOD | {b"labels": [2**70, 1]}), NO_BATCH),
    "labels-nested": (batch(GOOD | {b"labels": nested()}), "no list of whole numbers"),
    "labels-of-infinity": (batch(GOOD | {b"labels": [float("inf")] * 2}), "no list of whole numbers"),
    "one-label": (batch(GOOD | {b"labels": 3}), "no list of whole numbers"),
    "negative-label": (batch(GOOD | {b"labels": [-1, 1]}), "classes from 0 on"),
    "fewer-labels": (batch(GOOD | {b"labels": [1]}), "2 inputs and 1 labels"),
    "data-of-floats": (batch(GOOD | {b"data": np.full((2, 3072), 1e30)}), r"no bytes of shape \(N, 3072\)"),
    "data-of-objects": (batch(GOOD | {b"data": np.array([{}] * 2, object)}), NO_BATCH),
    "data-is-a-word": (batch(GOOD | {b"data": "abc"}), "no bytes of shape"),
    "cut": (batch(pickle.dumps(GOOD, 2)[:900]), NO_BATCH),
    "deep-tuples": (code(b")" + b"\x85" * 10**6), NO_BATCH),
    "string-of-terabytes": (batch(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x."), NO_BATCH),
    "bytes-of-gigabytes": (batch(b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x."), NO_BATCH),
    "memo-of-gigabytes": (code(b"Nr" + struct.pack("<I", 2**31 - 1)), NO_BATCH),
    "a-number-of-10^5-digits": (code(b"I" + b"9" * 10**5 + b"\n"), NO_BATCH),
    "binary-cut": (files(test_batch__bin=bytes(2 * 3073 - 5)), "no whole number of 3073"),
    "binary-of-holes": (files(test_batch__bin=3073 * 3_000_000), "far more than it has on the disk"),
    "svhn-text": (files(test_32x32__mat=b"hello"), "no SVHN file"),
    "svhn-head": (files(test_32x32__mat=b"MATLAB 5.0 MAT-file" + bytes(200)), "no SVHN file"),
    "svhn-version-4": (files(test_32x32__mat=V4), "no SVHN file"),
    "svhn-of-structures": (mat(X={"a": 1}, y="abc"), "no SVHN file"),
    "svhn-of-floats": (mat(X=np.zeros((32, 32, 3, 2)), y=np.ones((2, 1))), "not bytes"),
    "svhn-bomb": (mat(X=np.broadcast_to(np.uint8(0), (32, 32, 3, 300_000)), y=np.ones((300_000, 1))), "no SVHN file"),
    "stl-cut": (files(test_X__bin=bytes(100), test_y__bin=b"1"), "truncated: 100 bytes for 1 images"),
    "stl-without-labels": (files(test_X__bin=bytes(100)), "missing"),
    "stl-of-holes": (files(test_X__bin=27648 * 10**6, test_y__bin=10**6), "far more than it has on the disk"),
}  # fmt: skip
