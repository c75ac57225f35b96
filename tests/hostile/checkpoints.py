"""Checkpoints of torch."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import torch

from lirpa_ext.models.architectures import named_network
from lirpa_ext.models.loading import load_model as read  # noqa: F401

from .arrays import Execute
from .batches import nested

NAME = "lirpa_ext.models.architectures:named_network"
SMALL = {"name": "Small", "input_shape": [1, 12, 12]}
STATE = named_network(**SMALL).state_dict()


def warm():
    """What is imported and compiled once is not the file's."""
    file = io.BytesIO(bytes_of({"architecture": NAME, "kwargs": SMALL, "state_dict": STATE}))
    torch.load(file, weights_only=True)


def bytes_of(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def file(content):
    def make(folder):
        (folder / "net.pt").write_bytes(content(folder) if callable(content) else content)
        return folder / "net.pt"

    return make


def checkpoint(**changes):
    return file(bytes_of({"architecture": NAME, "kwargs": SMALL, "state_dict": STATE} | changes))


def built(**changes):
    return checkpoint(kwargs=SMALL | changes)


def changed(part, change):
    """Maker of a checkpoint in which a part of the archive is another one, or missing."""
    source, target = bytes_of({"architecture": NAME, "kwargs": SMALL, "state_dict": STATE}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as before, zipfile.ZipFile(target, "w") as after:
        for member in before.infolist():
            content = before.read(member)
            content = change(content) if part in member.filename else content
            if content is not None:
                after.writestr(member.filename, content)
    return file(target.getvalue())


GOOD = bytes_of({"architecture": NAME, "kwargs": SMALL, "state_dict": STATE})
BROKEN, NOT_PLAIN, NO_FIT = "truncated or no checkpoint", "no plain checkpoint", "does not fit"
CASES = {
    "fine": (file(GOOD), None),
    "runs-code": (file(lambda folder: bytes_of(Execute(folder))), NOT_PLAIN),
    "runs-code-as-a-pickle": (file(lambda folder: pickle.dumps(Execute(folder))), f"{NOT_PLAIN}|{BROKEN}"),
    "a-part-runs-code": (changed("data.pkl", lambda _: b"cos\nmkdir\n(S'executed'\ntR."), NOT_PLAIN),
    "cut": (file(GOOD[:-30]), BROKEN),
    "nothing": (file(b""), BROKEN),
    "zeros": (file(bytes(1000)), BROKEN),
    "without-numbers": (changed("/data/", lambda _: None), BROKEN),
    "with-fewer-numbers": (changed("/data/", lambda content: content[:4]), BROKEN),
    "with-more-numbers": (changed("/data/", lambda content: content * 3), BROKEN),
    "without-index": (changed("data.pkl", lambda _: None), BROKEN),
    "deep-tuples": (changed("data.pkl", lambda _: b"\x80\x02)" + b"\x85" * 10**5 + b"."), "holds a tuple"),
    "string-of-gigabytes": (changed("data.pkl", lambda _: b"\x80\x02X" + struct.pack("<I", 2**31) + b"."), BROKEN),
    "future-version": (changed("version", lambda _: b"99999"), BROKEN),
    "odd-byte-order": (changed("byteorder", lambda _: b"weird"), BROKEN),
    "architecture-is-a-number": (checkpoint(architecture=3), NOT_PLAIN),
    "architecture-of-a-million": (checkpoint(architecture="x" * 10**6), NOT_PLAIN),
    "architecture-nested": (checkpoint(architecture=nested()), NOT_PLAIN),
    "shape-nested": (built(input_shape=nested()), NOT_PLAIN),
    "name-of-a-million": (built(name="x" * 10**6), NOT_PLAIN),
    "no-arguments": (checkpoint(kwargs=None), "kwargs are a NoneType"),
    "arguments-by-number": (checkpoint(kwargs={1: 2}), "cannot be built"),
    "shape-of-exabytes": (built(input_shape=[1, 2**62, 2**62]), "cannot be built|does not fit"),
    "shape-beyond-all-numbers": (built(input_shape=[1, 10**30, 12]), "cannot be built"),
    "negative-shape": (built(input_shape=[-1, 12, 12]), "cannot be built"),
    "shape-of-nan": (built(input_shape=[float("nan"), 12, 12]), "cannot be built"),
    "no-classes": (built(classes=0), "cannot be built"),
    "weights-nested": (checkpoint(state_dict=STATE | {"0.bias": nested()}), NO_FIT),
    "weights-by-number": (checkpoint(state_dict={1: torch.zeros(1)}), NO_FIT),
    "complex-weights": (checkpoint(state_dict={key: w.to(torch.complex64) for key, w in STATE.items()}), NO_FIT),
    "whole-weights": (checkpoint(state_dict={key: w.to(torch.int8) for key, w in STATE.items()}), NO_FIT),
    "weights-that-are-nowhere": (checkpoint(state_dict={key: w.to("meta") for key, w in STATE.items()}), NO_FIT),
    "a-tensor": (file(bytes_of(torch.zeros(3))), "holds a Tensor"),
    "old-format-cut": (file(bytes_of(STATE, _use_new_zipfile_serialization=False)[:700]), BROKEN),
}
