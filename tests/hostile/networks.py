"""ONNX: functions that grow, weights that are not there, tensors of terabytes, long chains."""

from __future__ import annotations

import gzip
import os
from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node

from lirpa_ext import load_onnx as read
from lirpa_ext.importer.converters import import_onnx2torch

ONE, EYE = [node("Relu", ["x"], ["y"])], np.eye(4, dtype=np.float32)
PRODUCT = [node("MatMul", ["x", "w"], ["y"])]
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("loc", 1)]


def network(nodes, shape=(1, 4), opsets=OPSETS, functions=(), **weights):
    tensors = [
        w if isinstance(w, TensorProto) else numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [value], [onnx.ValueInfoProto(name="y")], tensors)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def warm():
    """What is imported and compiled once is not the file's."""
    import_onnx2torch()
    read(network(ONE).SerializeToString())


def file(*arguments, change=lambda model: None, **options):
    """Maker of a network's file, in a folder with weights of 64 bytes; another such file lies outside."""

    def make(folder):
        model = network(*arguments, **options)
        change(model)
        (folder / "data").mkdir()
        (folder / "data" / "w.bin").write_bytes(bytes(64))
        (folder / "secret.bin").write_bytes(bytes(64))
        os.symlink(folder / "secret.bin", folder / "data" / "link.bin")
        (folder / "data" / "net.onnx").write_bytes(model.SerializeToString())
        return folder / "data" / "net.onnx"

    return make


def chain(op, count, inputs=(), **attributes):
    """As many nodes in a row."""
    names = ["x", *(f"t{index}" for index in range(1, count)), "y"]
    return [node(op, [a, *inputs], [b], **attributes) for a, b in pairwise(names)]


def function(name, *nodes):
    return helper.make_function("loc", name, ["a"], ["b"], list(nodes), OPSETS)


def call(name, source="x", target="y"):
    return node(name, [source], [target], domain="loc")


def laughs(count):
    """Functions that each call the one before twice: 2^count nodes."""
    more = [function(f"F{k}", call(f"F{k - 1}", "a", "m"), call(f"F{k - 1}", "m", "b")) for k in range(1, count + 1)]
    return [function("F0", node("Relu", ["a"], ["b"])), *more]


def branch(name):
    body = helper.make_graph([call(name)], "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])])
    return [node("If", ["c"], ["y"], then_branch=body, else_branch=body)]


def external(location, **more):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location} | more).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def stored(*dims, size=64, kind=TensorProto.FLOAT):
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=bytes(size))


def constant(tensor):
    return node("Constant", [], ["w"], value=tensor)


def filled(side):
    """side^2 numbers, of a shape that is computed, so that no one sees it coming."""
    return [
        node("Mul", ["s", "s"], ["t"]), node("ConstantOfShape", ["t"], ["w"]),
        node("ReduceSum", ["w"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"]),
    ]  # fmt: skip


def bomb(folder):
    content = network(PRODUCT, w=np.zeros((4, 9_000_000), np.float32)).SerializeToString()
    (folder / "net.onnx.gz").write_bytes(gzip.compress(content, 1))
    return folder / "net.onnx.gz"


def reverse(model):
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def double_weight(model):
    model.graph.initializer.append(model.graph.initializer[0])


def of_two_opsets(model):
    model.opset_import.append(helper.make_opsetid("", 13))


KERNEL, BIG = np.zeros((16, 16, 101, 101), np.float32), "over 134217728"
ELSEWHERE, CORRUPT = "do not lie beside it", "weight 'w' cannot be read"
CASES = {
    "fine": (file(chain("Relu", 20), change=reverse), None),
    "weights-fine": (file(PRODUCT, w=external("w.bin")), None),
    "10000-nodes-reversed": (file(chain("Relu", 10_000), change=reverse), "more than 2000 nodes"),
    "2000-nodes": (file(chain("Relu", 2000)), "2000 operations, over 1000"),
    "2000-nodes-reversed": (file(chain("Relu", 2000), change=reverse), "2000 operations, over 1000"),
    "old-opset-chain": (
        file(chain("Relu", 1990), opsets=[helper.make_opsetid("", 7)]), "1990 operations, over 1000"
    ),
    "batch-norms": (
        file(chain("BatchNormalization", 700, "abba"), a=np.ones(4, np.float32), b=np.zeros(4, np.float32)),
        "1400 operations, over 1000",
    ),
    "transposes": (file(chain("Transpose", 1000, perm=[0, 2, 1]), (1, 4, 4)), "nothing to bound"),
    "one-node-of-20000-inputs": (file([node("Sum", ["x"] * 20_000, ["y"])]), "inputs and outputs, over"),
    "doubling": (file([node("Concat", [n, n], [m], axis=1) for n, m in zip(
        ["x", *"abcdefghijklmnopqrstuvw"] + [f"t{i}" for i in range(20)],
        [*"abcdefghijklmnopqrstuvw"] + [f"t{i}" for i in range(20)] + ["y"], strict=True)]), BIG),
    "functions-that-call-twice": (file([call("F40")], functions=laughs(40)), "more than 2000 nodes once"),
    "19000-such-functions": (file([call("F19000")], functions=laughs(19_000)), "more than 2000 nodes once"),
    "such-functions-in-a-branch": (file(branch("F40"), functions=laughs(40), c=True), "more than 2000 nodes once"),
    "a-function-that-calls-itself": (file([call("F")], functions=[function("F", call("F", "a", "b"))]), "calls itself"),
    "two-that-call-each-other": (
        file([call("F")], functions=[function("F", call("G", "a", "b")), function("G", call("F", "a", "b"))]),
        "calls itself",
    ),
    "two-functions-of-a-name": (file([call("F0")], functions=laughs(0) * 2), "two functions of one name"),
    "weights-in-etc": (file(PRODUCT, w=external("/etc/passwd")), ELSEWHERE),
    "weights-above": (file(PRODUCT, w=external("../secret.bin")), ELSEWHERE),
    "weights-by-a-link": (file(PRODUCT, w=external("link.bin")), ELSEWHERE),
    "a-constant-above": (file([constant(external("../secret.bin")), *PRODUCT]), ELSEWHERE),
    "a-constant-of-a-function-above": (
        file([call("F")], functions=[function("F", constant(external("../secret.bin")), node("MatMul", "aw", "b"))]),
        ELSEWHERE,
    ),
    "weights-of-terabytes": (file(PRODUCT, w=external("w.bin", length=10**12)), "more than max_bytes"),
    "weights-from-before": (file(PRODUCT, w=external("w.bin", offset=-5)), "cannot be read"),
    "weights-from-a-word": (file(PRODUCT, w=external("w.bin", offset="abc")), "cannot be read"),
    "weights-in-a-folder": (file(PRODUCT, w=external(".")), "must lie beside it"),
    "weights-with-nul": (file(PRODUCT, w=external("a\0b")), "corrupt"),
    "fewer-numbers": (file(PRODUCT, w=stored(4, 4, size=60)), CORRUPT),
    "more-numbers": (file(PRODUCT, w=stored(4, 4, size=68)), CORRUPT),
    "dims-of-terabytes": (file(PRODUCT, w=stored(2**40, 4)), CORRUPT),
    "negative-dims": (file(PRODUCT, w=stored(-4, -4)), CORRUPT),
    "a-thousand-dims": (file(PRODUCT, w=stored(*[1] * 1000, size=4)), CORRUPT),
    "no-such-type": (file(PRODUCT, w=stored(4, 4, kind=77)), CORRUPT),
    "two-weights-of-a-name": (file(PRODUCT, w=EYE, change=double_weight), "two weights of one name"),
    "two-opsets": (file(ONE, change=of_two_opsets), "two opsets"),
    "a-node-that-reads-itself": (file([node("Add", ["x", "y"], ["y"])]), "a cycle through Add node 'y'"),
    "filled-to-terabytes": (file([node("ConstantOfShape", ["s"], ["w"]), node("Add", ["x", "w"], ["y"])],
                                 s=[2**20, 2**20]), BIG),
    "filled-unseen": (file(filled(0), s=[2**16]), "onnxruntime cannot run"),
    "padded": (file([node("Pad", ["x", "p"], ["y"])], p=[0, 2**40, 0, 0]), BIG),
    "tiled": (file([node("Tile", ["x", "s"], ["y"])], s=[1, 2**32]), BIG),
    "resized": (file([node("Resize", ["x", "", "s"], ["y"])], (1, 1, 8, 8), s=np.float32([1, 1, 1e5, 1e5])), BIG),
    "a-range": (file([node("Range", "abc", "r"), node("ReduceSum", ["r"], ["q"], keepdims=0),
                      node("Add", ["x", "q"], ["y"])], a=np.float32(0), b=np.float32(1e12), c=np.float32(1)), BIG),
    "many-large-tensors": (file(chain("Relu", 500), (1, 2**20)), "the network is enormous"),
    "a-slow-convolution": (file([node("Conv", ["x", "k"], ["y"], pads=[50] * 4)], (1, 16, 512, 512), k=KERNEL),
                           "the network is enormous"),
    "a-slow-pool": (file([node("MaxPool", ["x"], ["y"], kernel_shape=[2001, 2001], pads=[1000] * 4)],
                         (1, 1, 2001, 2001)), "the network is enormous"),
    "a-dilation-of-exabytes": (file([node("Conv", ["x", "k"], ["y"], dilations=[2**60] * 2)], (1, 1, 8, 8),
                                    k=np.zeros((1, 1, 3, 3), np.float32)), BIG),
    "names-of-a-million": (file([node("R" * 10**6, ["x"], ["y"])]), "characters and more"),
    "a-sequence": (file([node("SequenceConstruct", ["x"], ["y"])]), "no tensor"),
    "identity": (file([node("Identity", ["x"], ["y"])]), "nothing to bound"),
    "bomb": (bomb, "far more than it has"),
}  # fmt: skip
SLOW = {
    "1000-nodes": (file(chain("Relu", 1000)), "more than 9 s of processor time"),
    "990-sigmoids": (file(chain("Sigmoid", 990)), "more than 9.01 s of processor time"),
    "300-convolutions": (file(chain("Conv", 300, "k", pads=[1] * 4), (1, 4, 16, 16),
                              k=np.full((4, 4, 3, 3), 1 / 36, np.float32)), "more than 9 s of processor time"),
}  # fmt: skip
