"""Imported networks are the networks in the files: what torch exports, and what other exporters write."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, ImportedModel, PerturbationLpNorm, certify, load_onnx
from lirpa_ext.errors import DataError, InvalidInputError, OnnxError

IMAGE = (3, 8, 8)


# --- what torch exports -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(h + self.other(self.second(h)))
        return self.last(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(9, 3)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], 1))


class Parts(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a - b, x.sum(1, keepdim=True) * 0.5], 1)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.rest = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)

    def forward(self, x):
        return self.rest((x - self.mean) / self.std)


class View(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(36, 10)

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.last(h.view(h.size(0), -1))


def dense(*middle):
    return lambda: nn.Sequential(nn.Linear(6, 8), *[make() for make in middle], nn.Linear(8, 3))


def image(size, *layers):
    """A convolution, some layers, and a dense layer on the `size` values that they leave."""
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *[make() for make in layers], nn.Flatten(), nn.Linear(size, 10))


VECTORS = {
    "mlp": dense(nn.ReLU),
    "concat": Concat,
    "parts": Parts,
    "gelu": dense(nn.GELU),
    "gelu-tanh": dense(lambda: nn.GELU(approximate="tanh")),
    "elu": dense(nn.ELU),
    "selu": dense(nn.SELU),
    "celu": dense(lambda: nn.CELU(0.7)),
    "silu": dense(nn.SiLU),
    "mish": dense(nn.Mish),
    "softplus": dense(nn.Softplus),
    "softsign": dense(nn.Softsign),
    "prelu": dense(lambda: nn.PReLU(8)),
    "leaky": dense(nn.LeakyReLU),
    "hardswish": dense(nn.Hardswish),
    "hardsigmoid": dense(nn.Hardsigmoid),
    "hardtanh": dense(nn.Hardtanh),
    "relu6": dense(nn.ReLU6),
    "sigmoid": dense(nn.Sigmoid),
    "dropout": dense(nn.Dropout, nn.ReLU),
    "batch-norm": dense(nn.ReLU, lambda: nn.BatchNorm1d(8)),
    "layer-norm": dense(lambda: nn.LayerNorm(8), nn.ReLU),
    "softmax": dense(nn.ReLU, lambda: nn.Linear(8, 8), lambda: nn.Softmax(1)),
    "log-softmax": dense(nn.ReLU, lambda: nn.Linear(8, 8), lambda: nn.LogSoftmax(1)),
}
IMAGES = {
    "cnn": image(36, lambda: nn.BatchNorm2d(4), nn.ReLU, lambda: nn.MaxPool2d(2)),
    "resnet": Residual,
    "view": View,
    "normalized": Normalized,
    "average-pool": image(36, nn.ReLU, lambda: nn.AvgPool2d(2)),
    "average-pool-pad": image(36, lambda: nn.AvgPool2d(3, 2, 1)),
    "average-pool-no-count": image(36, lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "average-pool-ceil": image(36, lambda: nn.AvgPool2d(3, 2, ceil_mode=True)),
    "max-pool-pad": image(36, lambda: nn.MaxPool2d(3, 2, padding=1)),
    "max-pool-ceil": image(36, lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max-pool-ceil-relu": image(36, nn.ReLU, lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max-pool-dilated": image(64, lambda: nn.MaxPool2d(2, 1, dilation=2)),
    "global-max": image(4, lambda: nn.AdaptiveMaxPool2d(1)),
    "adaptive": image(16, lambda: nn.AdaptiveAvgPool2d(2)),
    "instance-norm": image(144, lambda: nn.InstanceNorm2d(4, affine=True), nn.ReLU),
    "group-norm": image(144, lambda: nn.GroupNorm(2, 4), nn.ReLU),
    "transposed": image(288, lambda: nn.ConvTranspose2d(4, 2, 2, 2), nn.ReLU),
    "upsample": image(576, lambda: nn.Upsample(scale_factor=2), nn.ReLU),
    "pixel-shuffle": image(144, lambda: nn.PixelShuffle(2), nn.ReLU),
    "reflect": image(256, lambda: nn.ReflectionPad2d(1)),
    "replicate": image(324, lambda: nn.ReplicationPad2d((1, 2, 0, 3))),
    "zero-pad": image(49, lambda: nn.ZeroPad2d((0, 1, 0, 1)), lambda: nn.Conv2d(4, 1, 1)),
    "same": image(144, lambda: nn.Conv2d(4, 4, 4, padding="same"), nn.ReLU),
}
SERIES = {
    "conv1d": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(4, 10)
    ),
}
NETWORKS = {
    **{name: (make, (6,)) for name, make in VECTORS.items()},
    **{name: (make, IMAGE) for name, make in IMAGES.items()},
    **{name: (make, (3, 8)) for name, make in SERIES.items()},
}
# torch's newer exporter takes a second or so, so that only the shapes of network that everyone has are in the fast part
COMMON = {"mlp", "cnn", "resnet", "average-pool", "gelu", "concat"}


def export(model, shape, dynamo, **options):
    """Bytes of the ONNX file that torch's exporter makes."""
    x = torch.rand(1, *shape)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if dynamo:
            return torch.onnx.export(model, (x,), dynamo=True, **options).model_proto.SerializeToString()
        buffer = io.BytesIO()
        torch.onnx.export(model, (x,), buffer, dynamo=False, **options)
        return buffer.getvalue()


def build(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    return model, shape


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        pytest.param(name, dynamo, id=f"{name}-{'dynamo' if dynamo else 'script'}",
                     marks=[pytest.mark.slow] if dynamo and name not in COMMON else [])
        for name in NETWORKS
        for dynamo in (True, False)
    ],
)  # fmt: skip
def test_torch_exports_come_back(name, dynamo):
    model, shape = build(name)
    imported = load_onnx(export(model, shape, dynamo))
    x = torch.randn(4, *shape)
    assert imported.batch_size is None
    assert imported.input_shape == shape
    with torch.no_grad():
        torch.testing.assert_close(imported(x), model(x), rtol=1e-4, atol=1e-5)
    perturbation = PerturbationLpNorm(norm=2, eps=0.05)
    lower, upper = BoundedModule(imported, x).compute_bounds(x=(BoundedTensor(x, perturbation),), method="bcp")
    step = torch.randn(20, *x.shape)
    step = 0.05 * step / step.flatten(2).norm(dim=2).view(20, 4, *[1] * len(shape))
    with torch.no_grad():
        outputs = torch.stack([model(x + one) for one in step])
    assert (outputs >= lower - 1e-4).all() and (outputs <= upper + 1e-4).all()


@pytest.mark.parametrize("opset", range(9, 21))
def test_every_opset_that_torch_writes(opset):
    model, shape = build("cnn")
    imported = load_onnx(export(model, shape, dynamo=False, opset_version=opset))
    assert imported.opset == opset
    x = torch.rand(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(imported(x), model(x), rtol=1e-4, atol=1e-5)


# --- what others write --------------------------------------------------------------------------------------------


def network(nodes, weights, inputs=None, outputs=None, opset=17, listed=False, ir=8, batch="batch"):
    """Bytes of a file: nodes as (op, inputs, outputs[, attributes]), weights by name."""
    inputs = inputs or {"x": (TensorProto.FLOAT, [batch, 4])}
    outputs = outputs or ["y"]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    if listed:
        values += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(
        [helper.make_node(op, i, o, name=f"node_{o[0]}", **(rest[0] if rest else {})) for op, i, o, *rest in nodes],
        "test", values, [onnx.ValueInfoProto(name=name) for name in outputs], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    for value in model.graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model.SerializeToString()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agrees(data, shape, tolerance=1e-5, **options):
    """The imported network, after comparing it with onnxruntime once more, on a batch of three."""
    imported = load_onnx(data, **options)
    x = torch.rand(3, *shape)
    expected = torch.from_numpy(imported.reference(x.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(imported(x), expected, rtol=tolerance, atol=tolerance)
    assert imported.input_shape == shape
    return imported


@pytest.mark.parametrize("opset", range(7, 24))
def test_opsets(opset):
    weights = {"w": random(4, 5), "b": random(5), "v": random(3, 5)}
    nodes = [("MatMul", ["x", "w"], ["h"]), ("Add", ["h", "b"], ["a"]), ("Relu", ["a"], ["r"]),
             ("Gemm", ["r", "v"], ["g"], {"transB": 1, "alpha": 0.5}) if opset >= 11 else
             ("Gemm", ["r", "v", "c"], ["g"], {"transB": 1, "alpha": 0.5}),
             ("Softmax", ["g"], ["y"], {"axis": 1})]  # fmt: skip
    if opset < 11:
        weights["c"] = random(3)
    imported = agrees(network(nodes, weights, opset=opset, listed=opset < 9, ir=3 if opset < 9 else 8), (4,))
    assert imported.opset == opset


def test_weights_listed_as_inputs_of_old_ir():
    data = network([("MatMul", ["x", "w"], ["y"])], {"w": random(4, 3)}, opset=8, listed=True, ir=3)
    assert agrees(data, (4,)).input_name == "x"


@pytest.mark.parametrize("target", [[1, 6], [1, -1], [-1, 6]])
def test_batch_baked_into_a_reshape(target):
    nodes = [("Conv", ["x", "k"], ["h"]), ("Reshape", ["h", "s"], ["f"]), ("MatMul", ["f", "w"], ["y"])]
    weights = {"k": random(3, 1, 2, 2), "s": np.array(target), "w": random(6, 2)}
    imported = agrees(
        network(nodes, weights, {"x": (TensorProto.FLOAT, [1, 1, 2, 3])}), (1, 2, 3)
    )  # fmt: skip
    assert imported.batch_size is None


def test_reshape_with_allowzero_and_a_shape_computed_from_the_input():
    nodes = [("Shape", ["x"], ["s"]), ("Gather", ["s", "zero"], ["n"]), ("Concat", ["n", "rest"], ["t"], {"axis": 0}),
             ("Reshape", ["x", "t"], ["f"], {"allowzero": 1}), ("MatMul", ["f", "w"], ["y"])]  # fmt: skip
    weights = {"zero": np.array([0]), "rest": np.array([6]), "w": random(6, 2)}
    data = network(nodes, weights, {"x": (TensorProto.FLOAT, ["batch", 2, 3])})
    imported = agrees(data, (2, 3))
    assert imported.batch_size is None
    assert any("folded" in note for note in imported.rewrites)


def test_a_batch_that_cannot_be_freed_is_worked_one_by_one():
    """A constant of batch 1 beside the input (a class token), as old exporters bake it."""
    nodes = [("Concat", ["token", "x"], ["c"], {"axis": 1}), ("Flatten", ["c"], ["f"]), ("MatMul", ["f", "w"], ["y"])]
    weights = {"token": random(1, 1, 2), "w": random(8, 3)}
    data = network(nodes, weights, {"x": (TensorProto.FLOAT, [1, 3, 2])})
    imported = agrees(data, (3, 2))
    assert imported.batch_size == 1
    x = torch.rand(4, 3, 2)
    with pytest.raises(Exception, match="single samples"):
        BoundedModule(imported, x)
    labels = imported(x).argmax(1)
    report = certify(imported, (x, labels), 0.01, attack="fgsm", radius=False, progress=False)
    assert [record["index"] for record in report.records] == [0, 1, 2, 3]
    assert all(level["status"] != "error" for record in report.records for level in record["levels"])


def test_batch_baked_at_another_size():
    nodes = [("Reshape", ["x", "s"], ["f"]), ("MatMul", ["f", "w"], ["y"])]
    weights = {"s": np.array([8, 6]), "w": random(6, 2)}
    imported = agrees(network(nodes, weights, {"x": (TensorProto.FLOAT, [8, 2, 3])}), (2, 3))
    assert imported.batch_size is None


def test_dropout_with_a_mask():
    nodes = [("Dropout", ["x"], ["d", "mask"]), ("MatMul", ["d", "w"], ["y"])]
    assert agrees(network(nodes, {"w": random(4, 3)}), (4,)).output_shape == (3,)
    last = [("MatMul", ["x", "w"], ["h"]), ("Dropout", ["h"], ["y", "mask"])]
    assert agrees(network(last, {"w": random(4, 3)}), (4,)).output_shape == (3,)


def test_dropout_in_training_mode_is_refused():
    nodes = [("Dropout", ["x", "r", "t"], ["y"])]
    data = network(nodes, {"r": np.array(0.5, np.float32), "t": np.array(True)})
    with pytest.raises(OnnxError, match=r"Dropout node 'node_y' is in training mode.*eval mode"):
        load_onnx(data)


def test_vector_input_with_the_weight_on_the_left():
    nodes = [("MatMul", ["w", "x"], ["h"]), ("Add", ["h", "b"], ["a"]), ("Relu", ["a"], ["r"]),
             ("MatMul", ["v", "r"], ["y"])]  # fmt: skip
    weights = {"w": random(5, 4), "b": random(5), "v": random(3, 5)}
    imported = agrees(network(nodes, weights, {"x": (TensorProto.FLOAT, [4])}), (4,))
    assert imported.output_shape == (3,)
    assert "batch axis added" in imported.rewrites


def test_column_input():
    nodes = [("Gemm", ["w", "x", "b"], ["h"], {"alpha": 0.5, "beta": 2.0}), ("Relu", ["h"], ["r"]),
             ("Transpose", ["r"], ["t"], {"perm": [1, 0]}), ("Flatten", ["t"], ["f"]), ("MatMul", ["v", "r"], ["m"]),
             ("Reshape", ["m", "s"], ["y"])]  # fmt: skip
    weights = {"w": random(5, 4), "b": random(5, 1), "v": random(3, 5), "s": np.array([3])}
    imported = agrees(network(nodes, weights, {"x": (TensorProto.FLOAT, [4, 1])}), (4, 1))
    assert imported.output_shape == (3,)


def test_an_op_that_has_no_known_batch_axis_is_named():
    nodes = [("ArgMax", ["x"], ["i"], {"axis": 0}), ("Cast", ["i"], ["y"], {"to": 1})]
    with pytest.raises(OnnxError, match=r"no batch axis.*ArgMax node 'node_i'.*batch axis in front") as caught:
        load_onnx(network(nodes, {}, {"x": (TensorProto.FLOAT, [4])}))
    assert (caught.value.op, caught.value.node, caught.value.opset) == ("ArgMax", "node_i", 17)


def test_channels_last():
    nodes = [("Transpose", ["x"], ["t"], {"perm": [0, 3, 1, 2]}), ("Conv", ["t", "k"], ["h"]),
             ("Transpose", ["h"], ["u"], {"perm": [0, 2, 3, 1]}), ("Flatten", ["u"], ["f"]),
             ("MatMul", ["f", "w"], ["y"])]  # fmt: skip
    data = network(nodes, {"k": random(2, 3, 3, 3), "w": random(8, 4)}, {"x": (TensorProto.FLOAT, ["n", 4, 4, 3])})
    assert agrees(data, (4, 4, 3)).layout == "NHWC"


def test_double_weights_and_inputs():
    nodes = [("MatMul", ["x", "w"], ["h"]), ("Cast", ["h"], ["y"], {"to": 1})]
    data = network(nodes, {"w": random(4, 3).astype(np.float64)}, {"x": (TensorProto.DOUBLE, ["batch", 4])})
    imported = agrees(data, (4,))
    assert imported(torch.rand(1, 4)).dtype == torch.float32
    assert any("float64" in note for note in imported.rewrites)


def test_integer_input_that_is_cast_at_once():
    nodes = [("Cast", ["x"], ["c"], {"to": 1}), ("Mul", ["c", "s"], ["d"]), ("MatMul", ["d", "w"], ["y"])]
    weights = {"s": np.array(1 / 255, np.float32), "w": random(4, 3)}
    imported = load_onnx(network(nodes, weights, {"x": (TensorProto.UINT8, ["batch", 4])}))
    x = torch.randint(0, 256, (3, 4)).float()
    torch.testing.assert_close(imported(x), torch.from_numpy(imported.reference(x.numpy())), rtol=1e-5, atol=1e-5)


def test_several_inputs_and_outputs():
    inputs = {"x": (TensorProto.FLOAT, ["batch", 4]), "z": (TensorProto.FLOAT, [1, 4])}
    nodes = [("Add", ["x", "z"], ["h"]), ("MatMul", ["h", "w"], ["y"]), ("Relu", ["h"], ["r"])]
    data = network(nodes, {"w": random(4, 3)}, inputs, ["y", "r"])
    with pytest.raises(OnnxError, match=r"2 inputs \(x, z\)"):
        load_onnx(data)
    with pytest.raises(OnnxError, match=r"2 outputs \(y, r\)"):
        load_onnx(data, fixed={"z": random(1, 4)})
    with pytest.raises(InvalidInputError, match="no output 'q'"):
        load_onnx(data, fixed={"z": random(1, 4)}, output="q")
    with pytest.raises(InvalidInputError, match="no input 'q'"):
        load_onnx(data, fixed={"q": 1}, output="y")
    with pytest.raises(InvalidInputError, match=r"'z' has shape \(1, 4\)"):
        load_onnx(data, fixed={"z": random(1, 5)}, output="y")
    assert agrees(data, (4,), fixed={"z": random(1, 4)}, output="y").output_shape == (3,)
    assert agrees(data, (4,), fixed={"z": random(1, 4)}, output="r").output_shape == (4,)


def test_open_sizes_must_be_given():
    nodes = [("GlobalAveragePool", ["x"], ["p"]), ("Flatten", ["p"], ["f"]), ("MatMul", ["f", "w"], ["y"])]
    data = network(nodes, {"w": random(3, 2)}, {"x": (TensorProto.FLOAT, ["n", 3, "h", "w_"])})
    with pytest.raises(OnnxError, match="leaves sizes open"):
        load_onnx(data)
    with pytest.raises(InvalidInputError, match="does not fit"):
        load_onnx(data, input_shape=(4, 5, 6))
    assert agrees(data, (3, 5, 6), input_shape=(3, 5, 6)).input_shape == (3, 5, 6)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_logits(op):
    nodes = [("MatMul", ["x", "w"], ["h"]), (op, ["h"], ["y"])]
    data = network(nodes, {"w": random(4, 3)})
    whole, cut = agrees(data, (4,)), agrees(data, (4,), logits=True)
    x = torch.randn(5, 4)
    assert torch.equal(whole(x).argmax(1), cut(x).argmax(1))
    torch.testing.assert_close(cut(x), x @ torch.from_numpy(random(4, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op", ["Conv", "MaxPool", "AveragePool"])
def test_automatic_padding(op, auto_pad):
    attributes = {"auto_pad": auto_pad, "kernel_shape": [3, 2], "strides": [2, 1]}
    nodes = [(op, ["x", "k"] if op == "Conv" else ["x"], ["y"], attributes)]
    data = network(nodes, {"k": random(2, 2, 3, 2)} if op == "Conv" else {}, {"x": (TensorProto.FLOAT, [1, 2, 6, 5])})
    agrees(data, (2, 6, 5))


@pytest.mark.parametrize(("pads", "dilation"), [([0, 1, 1, 2], 1), ([0, 0, 0, 0], 2), ([1, 1, 1, 1], 2)])
@pytest.mark.parametrize("relu", [True, False])
def test_max_pools_that_torch_does_not_have(pads, dilation, relu):
    attributes = {"kernel_shape": [2, 3], "pads": pads, "dilations": [dilation, 1]}
    nodes = [("Relu" if relu else "Neg", ["x"], ["h"]), ("MaxPool", ["h"], ["y"], attributes)]
    data = network(nodes, {}, {"x": (TensorProto.FLOAT, ["n", 2, 6, 6])})
    if dilation > 1 and any(pads) and not relu:
        agrees_or_refused = pytest.raises(OnnxError)
    else:
        agrees_or_refused = contextlib.nullcontext()
    with agrees_or_refused:
        agrees(data, (2, 6, 6))


def test_dense_layers_written_as_convolutions():
    nodes = [("Conv", ["x", "k"], ["h"]), ("Sigmoid", ["h"], ["s"]), ("Conv", ["s", "l", "b"], ["c"]),
             ("Flatten", ["c"], ["y"])]  # fmt: skip
    weights = {"k": random(5, 1, 1, 6), "l": random(3, 5, 1, 1), "b": random(3)}
    imported = agrees(network(nodes, weights, {"x": (TensorProto.FLOAT, [1, 1, 1, 6])}), (1, 1, 6))
    x = torch.rand(2, 1, 1, 6)
    bounded = BoundedModule(imported, x)
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),), method="CROWN")
    assert (lower < upper).all()


@pytest.mark.parametrize("slope", [0.25, [[0.5], [1.5], [-0.5]]])
def test_prelu(slope):
    data = network([("PRelu", ["x", "s"], ["y"])], {"s": np.array(slope, np.float32)},
                   {"x": (TensorProto.FLOAT, ["n", 3, 4])})  # fmt: skip
    agrees(data, (3, 4))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flatten_of_any_axis(axis):
    nodes = [("Flatten", ["x"], ["f"], {"axis": axis}), ("Reshape", ["f", "s"], ["r"]), ("Relu", ["r"], ["y"])]
    data = network(nodes, {"s": np.array([-1, 24])}, {"x": (TensorProto.FLOAT, [1, 2, 3, 4])})
    agrees(data, (2, 3, 4))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_old_softmax_flattens(axis):
    """Before opset 13 softmax ran over all axes from the given one on."""
    data = network([("Softmax", ["x"], ["y"], {"axis": axis})], {}, {"x": (TensorProto.FLOAT, [1, 2, 3, 4])}, opset=11)
    agrees(data, (2, 3, 4))


def test_gelu_in_pieces():
    """The five orders in which exporters write x/2 (1 + erf(x / sqrt 2))."""
    weights = {"root": np.float32(2**0.5), "inverse": np.float32(0.5**0.5), "one": np.float32(1),
               "half": np.float32(0.5), "two": np.float32(2)}  # fmt: skip
    erf = [("Div", ["x", "root"], ["s"]), ("Erf", ["s"], ["e"]), ("Add", ["e", "one"], ["a"])]
    variants = [
        [*erf, ("Mul", ["x", "a"], ["m"]), ("Mul", ["m", "half"], ["y"])],
        [*erf, ("Mul", ["a", "x"], ["m"]), ("Div", ["m", "two"], ["y"])],
        [*erf, ("Mul", ["x", "half"], ["h"]), ("Mul", ["h", "a"], ["y"])],
        [*erf, ("Mul", ["a", "half"], ["m"]), ("Mul", ["x", "m"], ["y"])],
        [("Mul", ["inverse", "x"], ["s"]), ("Erf", ["s"], ["e"]), ("Add", ["one", "e"], ["a"]),
         ("Mul", ["x", "half"], ["h"]), ("Mul", ["a", "h"], ["y"])],
    ]  # fmt: skip
    for nodes in variants:
        assert any("Gelu" in note for note in agrees(network(nodes, weights), (4,)).rewrites)
    third = [*erf, ("Mul", ["x", "a"], ["m"]), ("Mul", ["m", "inverse"], ["y"])]  # no GELU: another factor
    with contextlib.suppress(OnnxError):  # Erf alone may be unknown to the engine
        assert not any("Gelu" in note for note in agrees(network(third, weights), (4,)).rewrites)


def test_copies_and_pickles():
    import copy
    import pickle

    imported = agrees(network([("MatMul", ["x", "w"], ["y"])], {"w": random(4, 3)}), (4,))
    x = torch.rand(2, 4)
    for other in (copy.deepcopy(imported), pickle.loads(pickle.dumps(imported))):
        torch.testing.assert_close(other(x), imported(x))
        np.testing.assert_allclose(other.reference(x.numpy()), imported.reference(x.numpy()))
    assert isinstance(imported.double(), ImportedModel)
    assert imported(x.double()).dtype == torch.float64


def test_wrong_shapes_and_arguments():
    data = network([("MatMul", ["x", "w"], ["y"])], {"w": random(4, 3)})
    imported = load_onnx(data)
    with pytest.raises(InvalidInputError, match=r"takes \(B, 4\)"):
        imported(torch.rand(2, 5))
    with pytest.raises(InvalidInputError, match="batch_size"):
        load_onnx(data, batch_size=0)
    assert load_onnx(data, batch_size=7).check.batch_sizes == (1, 7)
    assert load_onnx(data).check.torch_error < 1e-5


# --- the check ----------------------------------------------------------------------------------------------------


def test_the_first_differing_node_is_named(monkeypatch):
    """A converter that is silently wrong is found out, and the node with it."""
    from lirpa_ext.importer import converters

    registry = converters.import_onnx2torch().node_converters.registry
    original = registry.get_converter

    def wrong(operation_type, version, domain=""):
        convert = original(operation_type, version, domain)
        if operation_type != "Tanh":
            return convert
        return lambda node, graph: convert(node, graph)._replace(torch_module=nn.Sigmoid())

    monkeypatch.setattr(registry, "get_converter", wrong)
    monkeypatch.setattr(converters.import_onnx2torch().converter, "get_converter", wrong)
    nodes = [("MatMul", ["x", "w"], ["h"]), ("Relu", ["h"], ["r"]), ("Tanh", ["r"], ["t"]), ("Neg", ["t"], ["y"])]
    with pytest.raises(OnnxError, match=r"differs from onnxruntime, by .* first at Tanh node 'node_t'"):
        load_onnx(network(nodes, {"w": random(4, 3)}))


def test_an_op_without_bounds_is_named():
    nodes = [("MatMul", ["x", "w"], ["h"]), ("Det", ["h"], ["y"])]
    with pytest.raises(OnnxError, match=r"Det node 'node_y'.*opset 17.*export the model") as caught:
        load_onnx(network(nodes, {"w": random(3, 3)}, {"x": (TensorProto.FLOAT, ["n", 3, 3])}))
    assert (caught.value.op, caught.value.opset) == ("Det", 17)


def test_data_dependent_control_flow_is_refused():
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "b", [], [onnx.ValueInfoProto(name="n")])
    nodes = [("ReduceSum", ["x"], ["s"], {"keepdims": 0}), ("Cast", ["s"], ["c"], {"to": TensorProto.BOOL}),
             ("If", ["c"], ["y"], {"then_branch": body, "else_branch": body})]  # fmt: skip
    with pytest.raises(OnnxError, match=r"If node 'node_y' branches or loops \(opset 17\)"):
        load_onnx(network(nodes, {}))


@pytest.mark.parametrize("suffix", [".onnx", ".onnx.gz"])
def test_files(tmp_path, suffix):
    import gzip

    data = network([("MatMul", ["x", "w"], ["y"])], {"w": random(4, 3)})
    path = tmp_path / f"net{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert load_onnx(path).output_shape == (3,)
    assert load_onnx(str(path)).output_shape == (3,)
    with pytest.raises(DataError, match="max_bytes=10"):
        load_onnx(path, max_bytes=10)


class Chunk(nn.Module):
    def forward(self, x):
        return x.chunk(2, -1)[0]


def test_sequences_of_tensors_are_refused():
    """What torch exports for more chunks than there are numbers."""
    file = io.BytesIO()
    options = {"dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}, "input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Chunk().eval(), (torch.zeros(1, 1),), file, dynamo=False, opset_version=17, **options)
    with pytest.raises(OnnxError, match=r"SplitToSequence node '.*' gives a list, no tensor"):
        load_onnx(file.getvalue())
