"""Nodes that exporters write and engines lack or get wrong: the same values, and bounds that hold."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from soundness import generator, samples
from test_importer import agrees, network, random
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, load_onnx
from lirpa_ext.errors import LirpaExtError, OnnxError

METHODS = ("IBP", "CROWN-IBP", "CROWN", "bcp", "bcp-crown")


def ints(*values):
    return np.array(values, np.int64)


def floats(value):
    return np.array(value, np.float32)


# (nodes from h to y, constants); h is (batch, 6)
MIDDLE = {
    "clip-below": ([("Clip", ["h", "a"], ["y"])], {"a": floats(-0.5)}),
    "clip-above": ([("Clip", ["h", "", "a"], ["y"])], {"a": floats(0.5)}),
    "clip-nothing": ([("Clip", ["h"], ["c"]), ("Neg", ["c"], ["y"])], {}),
    "max-with-a-large-number": ([("Max", ["h", "a"], ["y"])], {"a": floats(-1e30)}),
    "min-with-a-large-number": ([("Min", ["h", "a"], ["y"])], {"a": floats(3e38)}),
    "steep-leaky": ([("LeakyRelu", ["h"], ["y"], {"alpha": 1.5})], {}),
    "falling-leaky": ([("LeakyRelu", ["h"], ["y"], {"alpha": -0.3})], {}),
    "gather-from-the-end": ([("Gather", ["h", "i"], ["y"], {"axis": 1})], {"i": ints(3, -1, 0)}),
    "gather-one": ([("Gather", ["h", "i"], ["g"], {"axis": 1}), ("Unsqueeze", ["g", "o"], ["y"])],
                   {"i": np.array(-2), "o": ints(1)}),
    "gather-table": ([("Gather", ["h", "i"], ["g"], {"axis": 1}), ("Flatten", ["g"], ["y"])],
                     {"i": ints([0, 1], [2, -3])}),
    "slice-backwards": ([("Slice", ["h", "s", "e", "o", "t"], ["y"])],
                        {"s": ints(4), "e": ints(-100), "o": ints(1), "t": ints(-2)}),
    "slice-in-steps": ([("Slice", ["h", "s", "e", "o", "t"], ["y"])],
                       {"s": ints(0), "e": ints(2**62), "o": ints(-1), "t": ints(2)}),
    "split-without-a-name": ([("Split", ["h", "s"], ["", "q"], {"axis": 1}), ("Relu", ["q"], ["y"])],
                             {"s": ints(2, 4)}),
    "tile": ([("Tile", ["h", "r"], ["y"])], {"r": ints(1, 2)}),
    "expand": ([("Unsqueeze", ["h", "o"], ["u"]), ("Expand", ["u", "s"], ["e"]), ("Flatten", ["e"], ["y"])],
               {"o": ints(1), "s": ints(1, 3, 6)}),
    "where": ([("Where", ["c", "h", "z"], ["y"])], {"c": np.array([True, False] * 3), "z": floats(-np.inf).clip(-9)}),
    "where-of-two": ([("Relu", ["h"], ["r"]), ("Where", ["c", "h", "r"], ["y"])], {"c": np.array([True, False] * 3)}),
    "max-of-a-row": ([("ReduceMax", ["h"], ["y"], {"axes": [1], "keepdims": 0})], {}),
    "min-of-a-row": ([("ReduceMin", ["h"], ["y"], {"axes": [-1], "keepdims": 1})], {}),
    "squared-distance": ([("Pow", ["h", "two"], ["p"]), ("ReduceSum", ["p", "o"], ["y"], {"keepdims": 0})],
                         {"two": floats(2), "o": ints(1)}),
    "length": ([("ReduceL2", ["h"], ["y"], {"axes": [1]})], {}),
    "power-0": ([("Pow", ["h", "p"], ["q"]), ("Add", ["q", "h"], ["y"])], {"p": floats(0)}),
    "power-1": ([("Pow", ["h", "p"], ["y"])], {"p": floats(1)}),
    "power-3": ([("Pow", ["h", "p"], ["y"])], {"p": floats(3)}),
    "power-4": ([("Pow", ["h", "p"], ["y"])], {"p": floats(4)}),
    "power-of-whole-type": ([("Pow", ["h", "p"], ["y"])], {"p": np.array(2)}),
    **{
        f"positive-power{p:g}": ([("Abs", ["h"], ["b"]), ("Add", ["b", "c"], ["d"]), ("Pow", ["d", "p"], ["y"])],
                                 {"c": floats(0.3), "p": floats(p)})
        for p in (0.5, 2.5, -0.5, -1, -2, -3)
    },
    "root": ([("Abs", ["h"], ["b"]), ("Add", ["b", "c"], ["d"]), ("Sqrt", ["d"], ["y"])], {"c": floats(0.3)}),
    "quotient": ([("Abs", ["h"], ["b"]), ("Add", ["b", "c"], ["d"]), ("Div", ["h", "d"], ["y"])], {"c": floats(0.3)}),
    "constant-over-negative": ([("Exp", ["h"], ["e"]), ("Neg", ["e"], ["n"]), ("Div", ["c", "n"], ["y"])],
                               {"c": floats(2)}),
}  # fmt: skip


def around(imported, eps):
    """Bounds by every method, and outputs at points of the balls: (method, norm, lower, upper, least, most)."""
    double = imported.double()
    x = torch.randn(3, *imported.input_shape, generator=generator(1)).double()
    module = BoundedModule(double, x)
    for norm in (2.0, math.inf):
        perturbation = PerturbationLpNorm(norm=norm, eps=eps)
        points = samples(x, perturbation, 300, generator(2))
        with torch.no_grad():
            outputs = torch.stack([double(some) for some in points])
        for method in METHODS:
            lower, upper = module.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
            yield method, norm, lower, upper, outputs.amin(0), outputs.amax(0)


@pytest.mark.parametrize("name", MIDDLE)
def test_nodes_between_dense_layers(name):
    nodes, constants = MIDDLE[name]
    data = network([("MatMul", ["x", "w"], ["m"]), ("Add", ["m", "bias"], ["h"]), *nodes],
                   {"w": random(4, 6), "bias": random(6, seed=1), **constants})  # fmt: skip
    imported = agrees(data, (4,))
    assert imported.batch_size is None
    for method, norm, lower, upper, least, most in around(imported, 0.05):
        assert lower.isfinite().all() and upper.isfinite().all(), (method, norm)
        assert (lower <= least + 1e-9).all() and (upper >= most - 1e-9).all(), (method, norm)


IMAGES = {
    "pool-and-squeeze": ([("GlobalAveragePool", ["c"], ["g"]), ("Squeeze", ["g", "o"], ["y"])], {"o": ints(-1, -2)}),
    "max-over-the-image": ([("ReduceMax", ["c"], ["y"], {"axes": [2, 3], "keepdims": 0})], {}),
    "local-response": ([("LRN", ["c"], ["l"], {"size": 3, "alpha": 0.1}), ("Flatten", ["l"], ["y"])], {}),
    "unit-length": ([("Flatten", ["c"], ["f"]), ("LpNormalization", ["f"], ["y"], {"axis": 1})], {}),
    "slice-and-pool": ([("Slice", ["c", "s", "e", "o"], ["d"]),
                        ("MaxPool", ["d"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
                        ("Flatten", ["p"], ["y"])], {"s": ints(0), "e": ints(2), "o": ints(2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_nodes_behind_a_convolution(name):
    nodes, constants = IMAGES[name]
    data = network([("Conv", ["x", "k", "b"], ["c"]), *nodes],
                   {"k": random(4, 2, 2, 2), "b": random(4) + 3, **constants},
                   {"x": (TensorProto.FLOAT, ["n", 2, 5, 5])})  # fmt: skip
    for method, norm, lower, upper, least, most in around(agrees(data, (2, 5, 5), 1e-4), 0.02):
        assert (lower <= least + 1e-9).all() and (upper >= most - 1e-9).all(), (method, norm)


@pytest.mark.parametrize("build", [lambda x: 1 / x, lambda x: x**-2.0, lambda x: x**-1.0])
def test_a_pole_inside_of_the_box_certifies_nothing(build):
    class Model(nn.Module):
        def forward(self, x):
            return build(x)

    x = torch.tensor([[0.1, -0.1], [2.0, 3.0]], dtype=torch.float64)
    module = BoundedModule(Model(), x)
    for method in METHODS:
        ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.5))
        lower, upper = module.compute_bounds(x=(ball,), method=method)
        assert not lower[0].isfinite().any() and not upper[0].isfinite().any()
        assert (lower[1] <= build(x[1] + 0.5).minimum(build(x[1] - 0.5))).all()
        assert lower[1].isfinite().all()


def test_what_is_undefined_for_one_sample_leaves_the_others_their_bias():
    """The engine drops the bias terms of a whole batch where one of them is NaN."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(2, 2).double()

        def forward(self, x):
            return self.dense(1 / x) + (x * x).sum(1, keepdim=True)

    model = Model()
    x = torch.tensor([[0.1, 0.2], [2.0, 3.0]], dtype=torch.float64)
    for method in METHODS:
        both, alone = (
            BoundedModule(model, some).compute_bounds(
                x=(BoundedTensor(some, PerturbationLpNorm(norm=math.inf, eps=0.5)),), method=method
            )
            for some in (x, x[1:])
        )
        torch.testing.assert_close(both[0][1], alone[0][0])
        torch.testing.assert_close(both[1][1], alone[1][0])


def test_a_network_without_any_dense_layer():
    nodes = [("MatMul", ["x", "w"], ["d"]), ("Add", ["d", "b"], ["h"]), ("Relu", ["h"], ["r"]),
             ("MatMul", ["r", "v"], ["m"]),
             ("Flatten", ["m"], ["y"])]  # fmt: skip
    data = network(
        nodes, {"w": random(4, 5), "b": random(5), "v": random(5, 2)}, {"x": (TensorProto.FLOAT, ["n", 3, 4])}
    )
    for method, norm, lower, upper, least, most in around(agrees(data, (3, 4)), 0.05):
        assert (lower <= least + 1e-9).all() and (upper >= most - 1e-9).all(), (method, norm)


@pytest.mark.parametrize("to", [TensorProto.INT64, TensorProto.FLOAT16])
def test_rounding_is_refused(to):
    """The engine passes through a cast as if it were the identity."""
    data = network([("Cast", ["x"], ["c"], {"to": to}), ("Cast", ["c"], ["y"], {"to": 1})], {})
    with pytest.raises(OnnxError, match=r"^Cast node 'node_c' rounds to .* export the model") as caught:
        load_onnx(data)
    assert (caught.value.op, caught.value.node, caught.value.opset) == ("Cast", "node_c", 17)


def test_whole_numbers_that_are_used_as_such_are_refused():
    nodes = [("Gather", ["table", "x"], ["g"]), ("Flatten", ["g"], ["y"])]
    with pytest.raises(OnnxError, match=r"whole numbers .*Gather node 'node_g'.*float32"):
        load_onnx(network(nodes, {"table": random(9, 2)}, {"x": (TensorProto.INT64, ["n", 4])}))


def test_a_last_node_with_several_outputs_is_refused():
    with pytest.raises(OnnxError, match="several outputs"):
        load_onnx(network([("TopK", ["x", "k"], ["y", "i"])], {"k": ints(2)}))


def test_an_exponent_that_varies_is_refused():
    with pytest.raises(LirpaExtError, match="exponent"):
        load_onnx(network([("Pow", ["two", "x"], ["y"])], {"two": floats(2)}))


def test_the_node_names_of_one_file_may_be_missing():
    model = onnx.ModelProto.FromString(network([("Tanh", ["x"], ["t"]), ("Neg", ["t"], ["y"])], {}))
    for node in model.graph.node:
        node.ClearField("name")
    agrees(model.SerializeToString(), (4,))
