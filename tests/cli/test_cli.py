"""The command line end to end, model files and their errors."""

from __future__ import annotations

import gzip
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lirpa_ext import errors
from lirpa_ext.attacks import APGD
from lirpa_ext.certification.certify import certify
from lirpa_ext.cli import main
from lirpa_ext.data import load_data, load_digits
from lirpa_ext.importer.torchvision_repair import torchvision_or_placeholder
from lirpa_ext.models.loading import load_model, save_model
from lirpa_ext.models.preprocessing import Normalization

ARCHITECTURE = """
from torch import nn

def build(width=12):
    return nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 10))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working folder, with a module that builds the architecture."""
    (tmp_path / "my_cli_net.py").write_text(ARCHITECTURE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_cli_net", None)


@pytest.fixture
def model(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    import my_cli_net

    torch.manual_seed(0)
    model = my_cli_net.build()
    x, y = load_digits("train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def command(path, *more, data="digits", eps="0.05,0.2"):
    options = ["--limit", "12", "--attack-steps", "3", "--no-radius", "--quiet", *more]
    return main(["certify", str(path), "--data", data, "--norm", "2", "--eps", eps, "--method", "bcp", *options])


def export(model, path):
    torch.onnx.export(
        model, torch.zeros(1, 1, 8, 8), path, dynamo=False, opset_version=17,
        input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )  # fmt: skip


def test_checkpoint_end_to_end(folder, model, capsys):
    save_model(model, "net.pt", "my_cli_net:build", width=12)
    more = ("--arch", "my_cli_net:build", "--out", "out", "--radius", "--option", "tighten=False", "--batch-size", "5")
    assert command("net.pt", *more) == 0
    printed = capsys.readouterr().out
    assert "verified %" in printed and "written to out" in printed
    report = json.loads((folder / "out" / "report.json").read_text())
    x, y = load_digits("test")
    expected = certify(
        model, (x[:12], y[:12]), [0.05, 0.2], options={"tighten": False}, x_L=0.0, x_U=1.0,
        attack=APGD(3, 2), batch_size=5, progress=False,
    )  # fmt: skip
    assert report["records"] == expected.records
    assert report["meta"]["model_hash"] == expected.meta["model_hash"]
    assert {path.name for path in (folder / "out").iterdir()} == {
        "results.jsonl", "report.json", "report.csv", "report.png",
    }  # fmt: skip
    assert command("net.pt", *more) == 0  # resumes what is complete
    assert command("net.pt", *more, eps="0.1") == 2
    assert "eps is" in capsys.readouterr().err
    assert command("net.pt", *more, "--no-resume", eps="0.1") == 0
    assert (folder / "out" / "results.jsonl.1").exists()


def test_onnx_end_to_end(folder, model, capsys):
    export(model, folder / "net.onnx")
    loaded = load_model("net.onnx")
    x, _ = load_digits("test")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert command("net.onnx", "--out", "out") == 0
    found = json.loads((folder / "out" / "report.json").read_text())
    torch.save(model.state_dict(), "state.pt")
    assert command("state.pt", "--arch", "my_cli_net:build", "--out", "other") == 0
    other = json.loads((folder / "other" / "report.json").read_text())
    assert found["summary"] == other["summary"]
    assert found["summary"][0]["verified"] > 0
    capsys.readouterr()
    content = (folder / "net.onnx").read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 3):
        (folder / "cut.onnx").write_bytes(content[:cut])
        assert command("cut.onnx") == 2
        assert "cut.onnx is truncated" in capsys.readouterr().err


def test_normalization_is_inside_of_the_model(folder, model):
    torch.save(model.state_dict(), "state.pt")
    arguments = ("state.pt", "--arch", "my_cli_net:build", "--mean", "0.3", "--std", "0.5", "--out")
    assert command(*arguments, "out") == 0
    found = json.loads((folder / "out" / "report.json").read_text())
    x, y = load_digits("test")
    inner = nn.Sequential(Normalization([0.3], [0.5]), model)
    expected = certify(inner, (x[:12], y[:12]), [0.05, 0.2], x_L=0.0, x_U=1.0, attack=APGD(3, 2), radius=False,
                       progress=False)  # fmt: skip
    assert found["records"] == expected.records


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--method", "nonsense"), "unknown method"),
        (("--option", "nonsense=1"), "no option"),
        (("--option", "nonsense"), "KEY=VALUE"),
        (("--eps", "nan"), "finite"),
        (("--eps", "0.1,-1"), "not negative"),
        (("--norm", "0.5"), "norm must be"),
        (("--limit", "0"), "empty"),
        (("--data", "nonsense"), "there is no 'nonsense': give digits"),
        (("--data-range", "0,0.5"), "data range"),
        (("--data-range", "0"), "LO,HI"),
        (("--std", "0"), "std"),
        (("--arch", "my_cli_net:nothing"), "cannot be built"),
        (("--arch", "no_such_module:build"), "cannot be built"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_told_without_traceback(folder, model, capsys, arguments, text):
    torch.save(model.state_dict(), "state.pt")
    assert command("state.pt", "--arch", "my_cli_net:build", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lirpa-ext: error: ") and text in captured.err
    assert "Traceback" not in captured.err


def test_interruption_keeps_what_is_done(folder, model, capsys, monkeypatch):
    from lirpa_ext.certification.certifier import Certifier

    torch.save(model.state_dict(), "state.pt")
    original = Certifier.certify

    def interrupt(self, batch, *rest):
        if batch.start >= 5:
            raise KeyboardInterrupt
        return original(self, batch, *rest)

    arguments = ("state.pt", "--arch", "my_cli_net:build", "--out", "out", "--batch-size", "5")
    with monkeypatch.context() as patch:
        patch.setattr(Certifier, "certify", interrupt)
        assert command(*arguments) == 130
    assert "goes on" in capsys.readouterr().err
    assert len((folder / "out" / "results.jsonl").read_text().splitlines()) == 6
    assert command(*arguments) == 0
    assert len((folder / "out" / "results.jsonl").read_text().splitlines()) == 13


class Danger(nn.Module):
    """A module that only unpickling can bring back."""


def test_checkpoints(folder, model):
    save_model(model, "net.pt", "my_cli_net:build", width=12)
    with pytest.raises(errors.DataError, match="--arch my_cli_net:build"):
        load_model("net.pt")
    for options in ({"trust": True}, {"architecture": "my_cli_net:build"}):
        loaded = load_model("net.pt", **options)
        assert not loaded.training
        assert torch.equal(loaded[0].weight, model[0].weight)
    with pytest.raises(errors.DataError, match="does not fit"):
        save_model(model, "other.pt", "my_cli_net:build", width=13)
    with pytest.raises(errors.DataError, match="not a torch module"):
        load_model("net.pt", "builtins:dict")
    torch.save(model.state_dict(), "state.pt")
    with pytest.raises(errors.DataError, match="--arch"):
        load_model("state.pt")
    torch.save(Danger(), "module.pt")
    with pytest.raises(errors.DataError, match="--trust"):
        load_model("module.pt")
    assert isinstance(load_model("module.pt", trust=True), Danger)
    torch.save([1, 2], "list.pt")
    with pytest.raises(errors.DataError, match="holds a list"):
        load_model("list.pt")
    with pytest.raises(errors.DataError, match="no file"):
        load_model("nothing.pt")
    content = (folder / "state.pt").read_bytes()
    for cut in (0, 3, len(content) // 2, len(content) - 10):
        (folder / "cut.pt").write_bytes(content[:cut])
        for trust in (False, True):
            with pytest.raises(errors.DataError, match=r"cut\.pt"):
                load_model("cut.pt", "my_cli_net:build", trust=trust)


@pytest.mark.parametrize("failure", [ImportError("absent"), RuntimeError("operator torchvision::nms does not exist")])
def test_torchvision_that_cannot_be_imported(monkeypatch, failure):
    """A placeholder stands in for the import of onnx2torch, and is gone after it."""
    original = importlib.import_module

    def refuse(name, *rest):
        if name == "torchvision":
            raise failure
        return original(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    before = {name for name in sys.modules if name.startswith("torchvision")}
    with torchvision_or_placeholder():
        from torchvision.ops import roi_align

        with pytest.raises(ImportError, match="torchvision cannot be imported"):
            roi_align(None, None)
    assert {name for name in sys.modules if name.startswith("torchvision")} == before


def test_data_sources(folder):
    x, y = load_digits("test")
    assert x.shape == (360, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.aminmax() == (0, 1)
    assert len(load_data("digits", "train")[0]) == 1437
    assert sorted(y.unique().tolist()) == list(range(10))
    np.savez("a.npz", x=x.numpy(), y=y.numpy())
    np.savez("b.npz", images=(x.numpy() * 255).astype(np.uint8), labels=y.numpy().astype(np.uint8))
    np.save("x.npy", x.numpy().astype(np.float64))
    np.save("y.npy", y.numpy())
    for source in ("a.npz", "b.npz", "x.npy,y.npy"):
        found_x, found_y = load_data(source)
        assert found_x.dtype == torch.float32
        torch.testing.assert_close(found_x, x, rtol=0, atol=1 / 255)
        assert torch.equal(found_y, y)
    header = b"\0\0\x08\x03" + (3).to_bytes(4, "big") + (8).to_bytes(4, "big") * 2
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + bytes(range(192)))
    labels = b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([7, 0, 9])
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    images, labels = load_data(".")
    assert images.shape == (3, 1, 8, 8) and labels.tolist() == [7, 0, 9]
    assert float(images[2, 0, 7, 7]) == pytest.approx(191 / 255)
    for bad in ({"x": y.numpy(), "y": y.numpy()}, {"x": x.numpy(), "y": x.numpy()}, {"y": y.numpy()}):
        np.savez("bad.npz", **bad)
        with pytest.raises(errors.DataError, match=r"bad\.npz"):
            load_data("bad.npz")
