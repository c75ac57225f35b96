"""`inspect_onnx` and its command: what is in a file, what becomes of it, and why not."""

from __future__ import annotations

import io
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from lirpa_ext import errors
from lirpa_ext.cli import main
from lirpa_ext.data import load_digits
from lirpa_ext.importer.inspection import inspect_onnx


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10), nn.LogSoftmax(1)).eval()
    torch.onnx.export(model, torch.zeros(1, 1, 8, 8), tmp_path / "net.onnx", dynamo=False, opset_version=15)
    return tmp_path / "net.onnx"


def refused():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "first"), helper.make_node("Det", ["h"], ["y"], "second")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, ["n", 3, 3])], [value("y", 1, ["n"])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_what_is_found(file):
    found = inspect_onnx(file, ("IBP", "bcp"))
    assert found.opset == 15 and found.producer.startswith("pytorch")
    assert found.ops == {"Conv": 1, "Relu": 1, "Flatten": 1, "Gemm": 1, "LogSoftmax": 1}
    assert list(found.inputs.values()) == [(1, 1, 8, 8)] and list(found.outputs.values()) == [(1, 10)]
    assert found.parameters == 2 * 9 + 2 + 720 + 10
    assert [(op, shape) for op, _, shape in found.nodes][:2] == [("Conv", (1, 2, 6, 6)), ("Relu", (1, 2, 6, 6))]
    assert found.model is not None and found.refusal == ""
    assert [(trial.method, f"{trial.norm:g}", trial.bounded) for trial in found.trials] == [
        (method, norm, True) for method in ("IBP", "bcp") for norm in ("2", "inf")
    ]
    json.dumps(found.to_dict())


def test_a_refusal_is_found_as_well():
    found = inspect_onnx(refused())
    assert found.model is None and found.trials == () and found.ops == {"MatMul": 1, "Det": 1}
    assert "Det node 'second'" in found.refusal and "opset 17" in found.refusal
    with pytest.raises(errors.DataError, match="truncated"):
        inspect_onnx(refused()[:40])


def test_a_method_that_cannot_is_told_why(file):
    """alpha-CROWN has nothing to optimize without gradients; a timeout of nothing stops the others."""
    found = inspect_onnx(file, ("CROWN",), timeout=1e-9)
    assert [trial.reason for trial in found.trials] == ["took more than 1e-09 s"] * 2
    assert not any(trial.bounded for trial in found.trials)
    assert torch.is_grad_enabled()
    (first, _) = inspect_onnx(file, ("no-such-method",)).trials
    assert not first.bounded and "unknown method" in first.reason


def test_command(file, tmp_path, capsys):
    assert main(["inspect", str(file), "--method", "bcp", "--nodes", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    for part in ("opset 15, by pytorch", "1 Conv, 1 Relu", "[1, 1, 8, 8]", "any batch size", "onnxruntime by",
                 "bcp          l2    bounds in", "  Conv                     [1, 2, 6, 6]"):  # fmt: skip
        assert part in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["input_shape"] == [1, 8, 8] and written["check"]["torch_error"] < 1e-5
    (tmp_path / "det.onnx").write_bytes(refused())
    assert main(["inspect", str(tmp_path / "det.onnx")]) == 1
    assert "refused: Det node 'second'" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing.onnx")]) == 2
    assert main(["inspect", str(file), "--method", "bcp", "--json", str(tmp_path / "no" / "out.json")]) == 2


def test_certify_fits_the_image_to_the_network(tmp_path, capsys, monkeypatch):
    """A network of bytes with its channels last gives the certificates of the one that takes the raw image."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()

    class OfBytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model((x.permute(0, 3, 1, 2) * 0.5 + 5) / 255)

    x, _ = load_digits("test")
    with torch.no_grad():
        labels = model(x[:6]).argmax(1)
    np.savez("data.npz", x=x[:6].numpy(), y=labels.numpy())
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(model, x[:1], "raw.onnx", dynamo=False, opset_version=17, **names)
    torch.onnx.export(
        OfBytes(), torch.zeros(1, 8, 8, 1), "bytes.onnx", dynamo=False, opset_version=17, **names
    )  # fmt: skip
    arguments = [
        "--data",
        "data.npz",
        "--eps",
        "0.05",
        "--method",
        "CROWN",
        "--attack-steps",
        "0",
        "--quiet",
        "--no-radius",
    ]
    # x of the network is 2 (255 raw - 5): what it takes is (scale raw - mean) / std
    fitted = ["--scale", "255", "--mean", "5", "--std", "0.5"]
    for name, more in (("raw", []), ("bytes", fitted)):
        assert main(["certify", f"{name}.onnx", *arguments, *more, "--out", name]) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("raw", "bytes")]
    margins = [[record["levels"][0]["verified_margin"] for record in report["records"]] for report in reports]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3)
    assert reports[0]["meta"]["model_hash"] != reports[1]["meta"]["model_hash"]
    assert main(["certify", "raw.onnx", *arguments, "--mean", "0.1,0.2,0.3"]) == 2
    assert "1 channels, mean 3" in capsys.readouterr().err


def test_the_last_softmax_is_cut_off_for_certification(tmp_path):
    from lirpa_ext.models.loading import load_model

    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    buffer = io.BytesIO()
    torch.onnx.export(model, torch.zeros(1, 4), buffer, dynamo=False, opset_version=17)
    (tmp_path / "net.onnx").write_bytes(buffer.getvalue())
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "net.onnx")(x), model[0](x))
    assert onnx.load(tmp_path / "net.onnx").graph.node[-1].op_type == "Softmax"
