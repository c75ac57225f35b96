"""Files that are no network: a clear error each, quickly, and never a crash."""

from __future__ import annotations

import gzip
import random
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lirpa_ext import load_onnx
from lirpa_ext.errors import DataError, LirpaExtError, OnnxError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "onnx"


def model(**changes):
    """A small valid network, or one that `changes` made invalid."""
    rng = np.random.default_rng(0)
    weights = {"k": rng.normal(size=(2, 1, 3, 3)), "w": rng.normal(size=(8, 3)), "s": np.array([1, 8])}
    tensors = [
        numpy_helper.from_array(v if v.dtype.kind == "i" else v.astype(np.float32), n) for n, v in weights.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Reshape", ["r", "s"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def changed(change):
    made = model()
    change(made)
    return made.SerializeToString()


def set_weight(value):
    def change(made):
        weight = numpy_helper.to_array(made.graph.initializer[1]).copy()
        weight[2, 1] = value
        made.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w"))

    return change


def cycle(made):
    made.graph.node[1].input[0] = "f"


def external(made):
    tensor = made.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def custom(made):
    made.graph.node[1].domain = "com.example"
    made.opset_import.append(helper.make_opsetid("com.example", 1))


def input_size(size):
    def change(made):
        made.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size

    return change


def attribute(name, value):
    def change(made):
        made.graph.node[0].attribute.append(helper.make_attribute(name, value))

    return change


def opset(version):
    def change(made):
        made.opset_import[0].version = version

    return change


def half(made):
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def two(made):
    made.graph.node[3].output[0] = "r"


def unknown_input(made):
    made.graph.node[3].input[0] = "nowhere"


def no_output(made):
    del made.graph.output[:]


def another_output(made):
    made.graph.output[0].name = "nowhere"


def weight_shape(made):
    made.graph.initializer[1].dims[0] = 2**40


def wrong_weight(made):
    made.graph.initializer[1].dims[0], made.graph.initializer[1].dims[1] = 3, 8


def unconnected(made):
    made.graph.node[0].input[0] = "w"
    del made.graph.node[1:3]
    made.graph.node[0].op_type, made.graph.node[1].input[0] = "Neg", "c"
    del made.graph.node[0].input[1:]


BAD = {
    "empty": (b"", "truncated, or no ONNX file"),
    "text": (b"this is no protobuf at all, but a text", "truncated, or no ONNX file"),
    "truncated": (model().SerializeToString()[:200], "truncated, or no ONNX file"),
    "gzip-truncated": (gzip.compress(model().SerializeToString())[:-40], "truncated gzip"),
    "gzip-corrupt": (gzip.compress(b"x" * 4000)[:20] + b"\x55" * 40, "gzip"),
    "nan": (changed(set_weight(np.nan)), "NaN entries in weight 'w'"),
    "cycle": (changed(cycle), "cycle"),
    "external": (changed(external), "weights in other files"),
    "custom-domain": (changed(custom), r"Relu node 'relu' is of the custom domain 'com.example'.*standard ops"),
    "zero-size": (changed(input_size(0)), "axis of size 0"),
    "negative-size": (changed(input_size(-3)), "axis of size -3"),
    "small-map": (changed(input_size(2)), "axis of size 0"),
    "enormous-input": (changed(input_size(2**33)), "enormous"),
    "enormous-pads": (changed(attribute("pads", [2**20] * 4)), "elements|onnxruntime|shapes"),
    "negative-pads": (changed(attribute("pads", [-9] * 4)), "elements|onnxruntime|shapes|size 0"),
    "zero-strides": (changed(attribute("strides", [0, 0])), "onnxruntime|shapes|malformed"),
    "old": (changed(opset(6)), "opset 6; the oldest that can be read is 7"),
    "future": (changed(opset(999)), "opset 999, the installed onnx knows"),
    "half": (changed(half), "half precision.*float32"),
    "computed-twice": (changed(two), "'r' is computed twice"),
    "unknown-input": (changed(unknown_input), "nothing computes 'nowhere'"),
    "no-output": (changed(no_output), "no output"),
    "unknown-output": (changed(another_output), "nothing computes its output 'nowhere'"),
    "weight-shape": (changed(weight_shape), "weight 'w' cannot be read"),
    "wrong-weight": (changed(wrong_weight), "onnxruntime|shapes"),
    "unconnected": (changed(unconnected), "does not depend on input 'x'"),
}


def test_the_network_before_the_changes_is_fine():
    assert load_onnx(model().SerializeToString()).output_shape == (3,)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name):
    data, text = BAD[name]
    start = time.process_time()
    with pytest.raises(DataError, match=text):
        load_onnx(data)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB, of all tests in this process


def test_memory_of_a_bomb():
    """In a process of its own: less than 2 GiB in all, with a bomb of 1 GiB, importing the package included."""
    code = """
        import resource, zlib
        from lirpa_ext import load_onnx
        from lirpa_ext.errors import DataError
        pack, parts, zeros = zlib.compressobj(level=1, wbits=31), [], bytes(2**24)
        for _ in range(64):
            parts.append(pack.compress(zeros))
        try:
            load_onnx(b"".join(parts) + pack.flush())
        except DataError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    message, peak = done.stdout.splitlines()
    assert "expands to more than max_bytes" in message
    assert int(peak) < 2 * 2**20


def test_missing_external_data_names_the_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(changed(external))
    with pytest.raises(DataError, match=r"weights\.bin, which must lie beside it"):
        load_onnx(path)
    (tmp_path / "weights.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="weight 'w' cannot be read"):
        load_onnx(path)
    (tmp_path / "weights.bin").write_bytes(numpy_helper.to_array(model().graph.initializer[1]).tobytes())
    assert load_onnx(path).output_shape == (3,)


def test_external_data_outside_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    (tmp_path / "sub").mkdir()
    made = onnx.ModelProto.FromString(changed(external))
    made.graph.initializer[1].external_data[0].value = "../secret.bin"
    path = tmp_path / "sub" / "net.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(DataError):
        load_onnx(path)


def test_no_file():
    with pytest.raises(DataError, match="there is no file"):
        load_onnx("nowhere.onnx")


def test_refusals_carry_op_node_and_opset():
    with pytest.raises(OnnxError) as caught:
        load_onnx(changed(custom))
    assert (caught.value.op, caught.value.node, caught.value.opset) == ("Relu", "relu", 17)


# --- fuzzing ------------------------------------------------------------------------------------------------------

EXTREMES = [-5, -1, 0, 2, 3, 7, 100_000, 2**31, 2**40, 2**62]


def flip_bytes(data, rng):
    """Bit flips, truncation, garbage in the head."""
    mutant = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(mutant[: rng.randrange(len(mutant))])
    for _ in range((1, 20, 3)[kind - 1]):
        place = rng.randrange(len(mutant) if kind < 3 else min(len(mutant), 400))
        mutant[place] = mutant[place] ^ (1 << rng.randrange(8)) if kind < 3 else rng.randrange(256)
    return bytes(mutant)


def change_graph(data, rng):
    """Attributes, shapes, connections and ops that do not fit."""
    made = onnx.ModelProto.FromString(data)
    graph = made.graph
    for _ in range(rng.choice([1, 1, 2, 4])):
        node, extreme = rng.choice(graph.node), rng.choice(EXTREMES)
        kind = rng.randrange(6)
        if kind == 0 and node.attribute:
            one = rng.choice(node.attribute)
            if one.type == onnx.AttributeProto.INT:
                one.i = extreme
            elif one.type == onnx.AttributeProto.INTS and one.ints:
                one.ints[rng.randrange(len(one.ints))] = extreme
            elif one.type == onnx.AttributeProto.FLOAT:
                one.f = rng.choice([0.0, -1e30, float("nan"), float("inf")])
        elif kind == 1 and node.input:
            names = [name for other in graph.node for name in other.output] + [graph.input[0].name, ""]
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif kind == 2:
            graph.node.remove(node)
            if not graph.node:
                break
        elif kind == 3:
            node.op_type = rng.choice(
                ["Relu", "Add", "MaxPool", "Conv", "Reshape", "Softmax", "Pad", "Resize", "If", "Foo"]
            )
        elif kind == 4:
            dims = graph.input[0].type.tensor_type.shape.dim
            dims[rng.randrange(len(dims))].dim_value = max(extreme, 1)
        elif graph.initializer:
            tensor = rng.choice(graph.initializer)
            if tensor.data_type == TensorProto.INT64 and tensor.raw_data:
                value = np.frombuffer(tensor.raw_data, np.int64).copy()
                value[rng.randrange(len(value))] = extreme
                tensor.raw_data = value.tobytes()
            elif tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = extreme
    return made.SerializeToString()


def sources():
    if SHARED.is_dir():
        return [path.read_bytes() for path in sorted(SHARED.glob("*/*.onnx")) if path.stat().st_size < 500_000]
    return [model().SerializeToString()]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("mutate", [flip_bytes, change_graph])
def test_fuzz(mutate, part):
    """200 mutants of real files each: imported, or refused with an error of ours; a crash would end the run."""
    files = sources()
    for case in range(50):
        rng = random.Random(1000 * part + case)
        data = mutate(rng.choice(files), rng)
        start = time.process_time()
        try:
            load_onnx(data)
        except LirpaExtError as error:
            assert str(error)
        assert time.process_time() - start < 30
