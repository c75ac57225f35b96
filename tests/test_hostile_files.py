"""Files that lie, burst, nest, cut off or carry code: each is refused by an error of ours, or read, soon and in little room.

A file's generator writes it into a folder and says what is to be loaded. None may run code of the file's, take 10 s of
processor time or 2 GiB, or end in an error of another library.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lirpa_ext import Report, load_onnx, load_vnnlib
from lirpa_ext.data import load_data
from lirpa_ext.errors import LirpaExtError
from lirpa_ext.loading import load_model

SECONDS, BYTES = 10, 2 * 2**30
Case = Callable[[Path], Any]


class Code:
    """Leaves a mark where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "it_ran"),)


def written(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- ONNX ---


def model(nodes: list[Any], initializers: list[Any] = [], opset: int = 13, **more: Any) -> onnx.ModelProto:  # noqa: B006
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], **more)


def chain(count: int, reverse: bool = False) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x" if k == 0 else f"v{k}"], ["y" if k == count - 1 else f"v{k + 1}"])
        for k in range(count)
    ]
    return model(nodes[::-1] if reverse else nodes)


def functions(count: int, itself: bool = False) -> onnx.ModelProto:
    """Each calls the one before twice; or one calls itself."""
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("own", 1)]
    made = []
    for k in range(count):
        inner = f"F{k}" if itself else f"F{k - 1}"
        if k == 0 and not itself:
            nodes = [helper.make_node("Relu", ["a"], ["b"])]
        else:
            nodes = [
                helper.make_node(inner, ["a"], ["m"], domain="own"),
                helper.make_node(inner, ["m"], ["b"], domain="own"),
            ]
        made.append(helper.make_function("own", f"F{k}", ["a"], ["b"], nodes, opsets))
    call = helper.make_node(f"F{count - 1}", ["x"], ["y"], domain="own")
    whole = model([call], functions=made)
    whole.opset_import.append(helper.make_opsetid("own", 1))
    return whole


def weights(name: str = "w", dims: tuple[int, ...] = (4, 4), raw: bytes | None = None, **fields: Any) -> Any:
    tensor = TensorProto(name=name, dims=dims, data_type=fields.pop("data_type", TensorProto.FLOAT))
    tensor.raw_data = bytes(4 * 16) if raw is None else raw
    return tensor


def external(where: str) -> onnx.ModelProto:
    tensor = TensorProto(name="w", dims=(4, 4), data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=where)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor])


def branch(depth: int) -> Any:
    """If in If in If."""
    inner, plain = (helper.make_node(kind, ["x"], ["o"]) for kind in ("Relu", "Abs"))
    end = [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 4])]
    for _ in range(depth):
        bodies = (helper.make_graph([node], "b", [], end) for node in (inner, plain))
        inner = helper.make_node("If", ["c"], ["o"], then_branch=next(bodies), else_branch=next(bodies))
    return model(
        [inner, helper.make_node("Identity", ["o"], ["y"])], [weights("c", (), b"\1", data_type=TensorProto.BOOL)]
    )


def product(tensor: Any) -> onnx.ModelProto:
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor])


WHOLE = chain(3).SerializeToString()
ONNX: dict[str, Callable[[], bytes | onnx.ModelProto]] = {
    "empty": lambda: b"", "garbage": lambda: bytes(range(256)) * 20, "text": lambda: b"ONNX, please",
    "zeros": lambda: bytes(5000), "ones": lambda: b"\xff" * 5000, "cut at a third": lambda: WHOLE[: len(WHOLE) // 3],
    "cut at the end": lambda: WHOLE[:-2], "a pickle": lambda: pickle.dumps({"a": 1}), "no graph": lambda: onnx.ModelProto(),
    "no output": lambda: helper.make_model(helper.make_graph([], "g", [], [])),
    "5,000 nodes": lambda: chain(5000), "10,000 nodes reversed": lambda: chain(10_000, True),
    "2,000 nodes reversed": lambda: chain(2000, True),
    "functions that call twice": lambda: functions(30), "a function that calls itself": lambda: functions(1, True),
    "a circle": lambda: model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                               helper.make_node("Relu", ["b"], ["y"])]),
    "names twice": lambda: model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]),
    "a value from nowhere": lambda: model([helper.make_node("Add", ["x", "nowhere"], ["y"])]),
    "a domain of its own": lambda: model([helper.make_node("Relu", ["x"], ["y"], domain="evil")]),
    "an unknown operation": lambda: model([helper.make_node("Explode", ["x"], ["y"])]),
    "opset 999": lambda: model([helper.make_node("Relu", ["x"], ["y"])], opset=999),
    "opset -3": lambda: model([helper.make_node("Relu", ["x"], ["y"])], opset=-3),
    "data that are short": lambda: product(weights(raw=bytes(12))),
    "data that are long": lambda: product(weights(raw=bytes(4000))),
    "2**40 entries": lambda: product(weights(dims=(2**20, 2**20))),
    "an axis of -4": lambda: product(weights(dims=(-4, -4))), "an axis of 0": lambda: product(weights(dims=(4, 0), raw=b"")),
    "words for weights": lambda: product(TensorProto(name="w", dims=(1,), data_type=TensorProto.STRING, string_data=[b"a"])),
    "a type that is none": lambda: product(weights(data_type=77)),
    "NaN weights": lambda: product(weights(raw=np.full((4, 4), np.nan, np.float32).tobytes())),
    "external, above": lambda: external("../../../../../etc/passwd"), "external, absolute": lambda: external("/etc/passwd"),
    "external, missing": lambda: external("weights.bin"), "external, a device": lambda: external("/dev/zero"),
    "branches in branches": lambda: branch(20),
    "a constant of 2**40": lambda: model([
        helper.make_node("ConstantOfShape", ["w"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"]),
    ], [weights(dims=(2,), raw=np.array([2**20, 2**20]).tobytes(), data_type=TensorProto.INT64)]),
    "a tile of 2**40": lambda: model([
        helper.make_node("Tile", ["x", "w"], ["c"]), helper.make_node("ReduceSum", ["c"], ["y"]),
    ], [weights(dims=(2,), raw=np.array([2**20, 2**20]).tobytes(), data_type=TensorProto.INT64)]),
    "a padding of 2**40": lambda: model([
        helper.make_node("Pad", ["x", "w"], ["y"]),
    ], [weights(dims=(4,), raw=np.array([0, 0, 2**20, 2**20]).tobytes(), data_type=TensorProto.INT64)]),
}  # fmt: skip


def onnx_case(make: Callable[[], Any]) -> Case:
    def load(folder: Path) -> Any:
        content = make()
        content = content if isinstance(content, bytes) else content.SerializeToString()
        return load_onnx(written(folder / "net.onnx", content))

    return load


# --- VNN-LIB ---

HEAD = "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (>= X_0 0))\n(assert (<= X_0 1))\n"
UNSAFE = "(assert (<= Y_0 0))\n"
VNNLIB: dict[str, str | bytes] = {
    "empty": "", "garbage": bytes(range(256)) * 20, "zeros": bytes(4000), "no variables": "(assert (<= 1 2))",
    "never closed": HEAD + "(assert (<= Y_0 0)", "closed twice": HEAD + UNSAFE + ")", "100,000 open": "(" * 100_000,
    "100,000 open and closed": HEAD + "(assert " + "(and " * 100_000 + "(<= Y_0 0)" + ")" * 100_001,
    "200,000 disjuncts": HEAD + "(assert (or" + " (and (<= Y_0 0))" * 200_000 + "))",
    "a product of ors": HEAD + "(assert (or (<= Y_0 0) (>= Y_0 5)))\n" * 60,
    "words after the end": HEAD + UNSAFE + "(exit)\n(assert (<= Y_0 5))", "prose after the end": HEAD + UNSAFE + "(exit) and so on",
    "1e999999": HEAD + "(assert (<= Y_0 1e999999))", "NaN": HEAD + "(assert (<= Y_0 nan))",
    "infinity": HEAD + "(assert (<= Y_0 inf))", "a long number": HEAD + "(assert (<= Y_0 " + "9" * 100_000 + "))",
    "a long name": HEAD + "(assert (<= " + "Y" * 1_000_000 + " 0))", "unknown command": HEAD + UNSAFE + "(check-sat)(launch)",
    "unknown variable": HEAD + "(assert (<= Y_7 0))", "declared twice": HEAD + HEAD + UNSAFE,
    "an empty box": HEAD + "(assert (<= X_0 -1))\n" + UNSAFE, "a product": HEAD + "(assert (<= (* Y_0 Y_0) 0))",
    "a variable of index 10**9": "(declare-const X_1000000000 Real)" + UNSAFE, "no output": HEAD + "(assert (<= X_0 0.5))",
    "an index of words": "(declare-const X_a Real)" + UNSAFE, "a quotient by 0": HEAD + "(assert (<= (/ Y_0 0) 1))",
    "a comment alone": "; nothing", "a file of ands": HEAD + "(assert (and" + " (<= Y_0 0)" * 300_000 + "))",
}  # fmt: skip


def vnnlib_case(content: str | bytes) -> Case:
    return lambda folder: load_vnnlib(written(folder / "p.vnnlib", content))


# --- archives of data ---


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def member(folder: Path, shape: str, data: bytes, kind: str = "<f4", compressed: bool = False) -> str:
    """An archive whose x.npy says a shape."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data
    with zipfile.ZipFile(folder / "d.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr("x.npy", array)
        archive.writestr("y.npy", array)
    return str(folder / "d.npz")


def idx(folder: Path, images: bytes, labels: bytes = b"\0\0\x08\x01\0\0\0\1\3", packed: bool = False) -> str:
    for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
        name = f"t10k-{kind}-ubyte" + (".gz" if packed else "")
        written(folder / name, gzip.compress(content) if packed else content)
    return str(folder)


def header(*dims: int, magic: bytes = b"\0\0\x08\x03") -> bytes:
    return magic + b"".join(struct.pack(">I", dim) for dim in dims)


def png(width: int, height: int, data: bytes) -> bytes:
    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", sizes) + part(b"IDAT", zlib.compress(data)) + part(b"IEND", b"")


def images(folder: Path, *contents: bytes) -> str:
    for k, content in enumerate(contents):
        (folder / "test" / str(k)).mkdir(parents=True)
        written(folder / "test" / str(k) / "i.png", content)
    return str(folder)


def cifar(folder: Path, content: Any) -> str:
    (folder / "cifar-10-batches-py").mkdir()
    place = folder / "cifar-10-batches-py"
    written(place / "test_batch", content if isinstance(content, bytes) else pickle.dumps(content))
    return str(place)


GOOD = png(2, 2, b"\0ab\0cd")
LARGE = png(64, 64, bytes(range(65)) * 64)
X, Y = np.zeros((3, 1, 2, 2), np.float32), np.arange(3)
DATA: dict[str, Callable[[Path], str]] = {
    "npz: objects": lambda f: npz(f, x=np.array([Code(f)], dtype=object), y=Y), "npz: no labels": lambda f: npz(f, x=X),
    "npz: words": lambda f: npz(f, x=X, y=np.array(["a", "b", "c"])), "npz: lengths": lambda f: npz(f, x=X, y=Y[:2]),
    "npz: NaN": lambda f: npz(f, x=X * np.nan, y=Y), "npz: half labels": lambda f: npz(f, x=X, y=Y + 0.5),
    "npz: labels below 0": lambda f: npz(f, x=X, y=Y - 5), "npz: a number": lambda f: npz(f, x=np.float32(1), y=Y),
    "npz: empty": lambda f: npz(f, x=X[:0], y=Y[:0]), "npz: complex": lambda f: npz(f, x=X.astype(complex), y=Y),
    "npz: dates": lambda f: npz(f, x=X, y=np.array(["2020", "2021", "2022"], dtype="datetime64")),
    "npz: 2**40 entries": lambda f: member(f, f"({2**40},)", b""), "npz: below 0": lambda f: member(f, "(-5, 2)", b""),
    "npz: a shape of words": lambda f: member(f, "('a',)", b""), "npz: code for a shape": lambda f: member(f, "(__import__('os').mkdir('it_ran'),)", b""),
    "npz: an unknown type": lambda f: member(f, "(1,)", b"abcd", "<q9"), "npz: an object's type": lambda f: member(f, "(1,)", pickle.dumps(Code(f)), "|O"),
    "npz: a bomb": lambda f: member(f, f"({2**28},)", bytes(2**27), compressed=True),
    "npz: garbage": lambda f: written(f / "d.npz", b"PK\3\4" + bytes(500)), "npz: nothing": lambda f: written(f / "d.npz", b""),
    "npz: cut": lambda f: written(f / "e.npz", Path(npz(f, x=X, y=Y)).read_bytes()[:-40]),
    "idx: short": lambda f: idx(f, header(10, 28, 28) + b"abc"), "idx: long": lambda f: idx(f, header(1, 2, 2) + bytes(900)),
    "idx: 2**96 entries": lambda f: idx(f, header(2**32 - 1, 2**32 - 1, 2**32 - 1)), "idx: no header": lambda f: idx(f, b"\0"),
    "idx: another type": lambda f: idx(f, header(1, 2, 2, magic=b"\0\0\x0d\x03") + bytes(16)),
    "idx: another rank": lambda f: idx(f, header(1, 2, magic=b"\0\0\x08\x02") + bytes(2)),
    "idx: no images": lambda f: idx(f, header(0, 28, 28), header(0, magic=b"\0\0\x08\x01")),
    "idx: labels of another number": lambda f: idx(f, header(2, 1, 1) + b"ab"),
    "idx: a bomb": lambda f: idx(f, header(1, 2, 2) + bytes(2**28), packed=True),
    "idx: cut gz": lambda f: (idx(f, header(1, 2, 2) + b"abcd", packed=True), written(f / "t10k-images-idx3-ubyte.gz", gzip.compress(bytes(999))[:20]))[0],
    "idx: no gz": lambda f: (idx(f, b"", packed=True), written(f / "t10k-images-idx3-ubyte.gz", b"text"))[0],
    "image: cut": lambda f: images(f, LARGE[: len(LARGE) // 2], LARGE), "image: text": lambda f: images(f, b"not a picture", GOOD),
    "image: empty": lambda f: images(f, b"", GOOD), "image: 2**30 pixels": lambda f: images(f, png(2**15, 2**15, bytes(2**20)), GOOD),
    "image: two sizes": lambda f: images(f, GOOD, png(1, 1, b"\0a")), "image: sums that are wrong": lambda f: images(f, GOOD[:40] + b"\xff" + GOOD[41:], GOOD),
    "cifar: code": lambda f: cifar(f, {b"data": Code(f), b"labels": [0]}), "cifar: a list": lambda f: cifar(f, [1, 2]),
    "cifar: no labels": lambda f: cifar(f, {b"data": np.zeros((1, 3072), np.uint8)}), "cifar: words": lambda f: cifar(f, {b"data": "x", b"labels": "y"}),
    "cifar: garbage": lambda f: cifar(f, b"\x80\x04garbage"), "cifar: short rows": lambda f: cifar(f, {b"data": np.zeros((1, 5), np.uint8), b"labels": [0]}),
    "cifar: labels": lambda f: cifar(f, {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]}), "cifar: cut": lambda f: cifar(f, pickle.dumps({b"data": bytes(99)})[:-9]),
}  # fmt: skip


def data_case(make: Callable[[Path], str]) -> Case:
    return lambda folder: load_data(make(folder), "test")


# --- checkpoints ---


def saved(folder: Path, content: Any) -> str:
    torch.save(content, folder / "m.pt")
    return str(folder / "m.pt")


def named(folder: Path, architecture: Any, kwargs: Any, state: Any = None) -> str:
    return saved(folder, {"architecture": architecture, "kwargs": kwargs, "state_dict": {} if state is None else state})


OURS = "lirpa_ext.training.architectures:named_network"
NET = {"name": "2C2F", "input_shape": [1, 8, 8]}
CHECKPOINTS: dict[str, Callable[[Path], str]] = {
    "empty": lambda f: written(f / "m.pt", b""), "text": lambda f: written(f / "m.pt", "weights"), "a module": lambda f: saved(f, torch.nn.Linear(2, 2)),
    "code": lambda f: saved(f, {"state_dict": Code(f)}), "a pickle of code": lambda f: written(f / "m.pt", pickle.dumps(Code(f))),
    "cut": lambda f: written(f / "n.pt", Path(saved(f, {"a": torch.zeros(99)})).read_bytes()[:-60]), "a number": lambda f: saved(f, 3),
    "os:system": lambda f: named(f, "os:system", {"command": f"touch {f}/it_ran"}), "no name": lambda f: named(f, 7, {}),
    "other values": lambda f: named(f, OURS, {"name": torch.zeros(2)}), "2**40 wide": lambda f: named(f, OURS, NET | {"input_shape": [1, 2**20, 2**20]}),
    "10**12 classes": lambda f: named(f, OURS, NET | {"classes": 10**12}), "classes of words": lambda f: named(f, OURS, NET | {"classes": "x"}),
    "no weights": lambda f: named(f, OURS, NET), "a user's network": lambda f: named(f, OURS, NET | {"name": "os:getcwd"}),
    "expanded": lambda f: saved(f, {"architecture": OURS, "kwargs": NET, "state_dict": {"0.weight": torch.zeros(1).expand(2**40)}}),
    "a zip bomb": lambda f: member(f, "(1,)", bytes(2**28), compressed=True),
}  # fmt: skip


def checkpoint_case(make: Callable[[Path], str]) -> Case:
    def load(folder: Path) -> Any:
        path = Path(make(folder))
        return load_model(path if path.suffix == ".pt" else path.rename(folder / "z.pt"))

    return load


# --- results ---

FIRST = '{"format": "lirpa-ext certification 1", '
RESULTS: dict[str, str | bytes] = {
    "empty": "", "garbage": bytes(range(256)), "a list": "[]", "a number": "1" * 100_000, "deep": "[" * 100_000,
    "deep meta": FIRST + '"method": ' + "[" * 100_000, "no fields": FIRST + '"a": 1}\n', "NaN": FIRST + '"eps": [NaN]}\n',
    "1e400": FIRST + '"eps": [1e400], "method": "bcp"}\n', "no text": FIRST.encode() + b'"model": "\xff\xfe"}\n',
    "another program": json.dumps({"meta": {}, "records": []}), "records of words": json.dumps({"meta": FIRST, "records": "x"}),
    "null": "null", "a string": '"' + "a" * 1_000_000 + '"', "cut": FIRST,
}  # fmt: skip


def results_case(content: str | bytes) -> Case:
    return lambda folder: Report.load(written(folder / "r.jsonl", content))


# --- configurations of a run ---

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}, *a{k - 1}, *a{k - 1}]\n" for k in range(1, 16))
CONFIGURATIONS: dict[str, str | bytes] = {
    "code": "model: !!python/object/apply:os.mkdir [FOLDER/it_ran]\n", "code, new": "model: !!python/object/new:os.system [touch FOLDER/it_ran]\n",
    "a bomb": BOMB, "deep": "a: " + "[" * 5000 + "]" * 5000, "deep blocks": "- " * 5000 + "x", "deep, fewer": "a: " + "[" * 900 + "]" * 900,
    "long": "a: 1\n" * 200_000, "an alias of itself": "a: &b [*b]\n", "garbage": bytes(range(256)), "a list": "- 1\n- 2\n", "a word": "hello",
    "tabs": "model:\n\tname: x\n", "an open quote": 'model: "x\n', "a module": "data: {class_path: os.system, init_args: {command: touch FOLDER/it_ran}}\n",
    "numbers for words": "model: {network: 3, loss: 4, eps: []}\n", "a bad anchor": "model: *nothing\n", "null": "null\n", "zeros": bytes(100),
}  # fmt: skip


def configuration_case(content: str | bytes) -> Case:
    def load(folder: Path) -> Any:
        from lirpa_ext.training.runs import fit, parse

        pytest.importorskip("jsonargparse")
        text = content.replace("FOLDER", str(folder)) if isinstance(content, str) else content
        return fit(parse(["--config", written(folder / "c.yaml", text), "--run", str(folder / "run")]))

    return load


def pipe_case(folder: Path) -> Any:
    from lirpa_ext.training.runs import parse

    os.mkfifo(folder / "c.yaml")
    return parse(["--config", str(folder / "c.yaml")])


CASES: dict[str, Case] = {
    "yaml: a pipe": pipe_case,
    **{f"onnx: {name}": onnx_case(make) for name, make in ONNX.items()},
    "onnx: a bomb": lambda folder: load_onnx(written(folder / "n.onnx.gz", gzip.compress(bytes(2**31 + 5), 1))),
    **{f"vnnlib: {name}": vnnlib_case(content) for name, content in VNNLIB.items()},
    "vnnlib: a bomb": lambda folder: load_vnnlib(written(folder / "p.vnnlib.gz", gzip.compress(b" " * 2**28, 1))),
    **{name: data_case(make) for name, make in DATA.items()},
    **{f"checkpoint: {name}": checkpoint_case(make) for name, make in CHECKPOINTS.items()},
    **{f"results: {name}": results_case(content) for name, content in RESULTS.items()},
    **{f"yaml: {name}": configuration_case(content) for name, content in CONFIGURATIONS.items()},
}
# Of these a library reads what it can, and that is right: they are no lie.
READ = {
    "onnx: data that are long",
    "vnnlib: an empty box",
    "vnnlib: no output",
    "vnnlib: a file of ands",
}


def out_of_time(*_: Any) -> None:
    raise AssertionError(f"{SECONDS} s of processor time are over")


def test_there_are_at_least_100():
    assert len(CASES) >= 100


SLOW = ("onnx: a bomb", "npz: a bomb", "idx: a bomb", "vnnlib: a file of ands", "vnnlib: 200,000 disjuncts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_hostile_file_is_refused_soon(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        CASES[name](tmp_path)
        assert name in READ, "it was read"
    except LirpaExtError as error:
        assert len(str(error)) > 15
        assert "Traceback" not in str(error) and len(str(error)) < 3000
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    assert not (tmp_path / "it_ran").exists()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_a_code_would_leave_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path)))
    assert (tmp_path / "it_ran").exists()
    assert io.BytesIO(GOOD).read(4) == b"\x89PNG"
