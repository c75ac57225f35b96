"""Checkpoints that nobody vouches for: they build networks of a fixed list, run nothing, and take no more memory."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest
import torch

from lirpa_ext.errors import DataError
from lirpa_ext.models.architectures import named_network
from lirpa_ext.models.loading import load_model, save_model

NAMED = "lirpa_ext.models.architectures:named_network"
SMALL = {"name": "Small", "input_shape": [1, 12, 12]}


def executed(folder):
    return (folder / "executed").exists()


HOSTILE = {
    "a builder of ours that builds anything": lambda d: (
        "lirpa_ext.models.loading:_build", {"architecture": "os:system", "kwargs": {"command": f"touch {d}/executed"}}
    ),
    "a loader of ours": lambda d: ("lirpa_ext.models.loading:load_model", {"path": f"{d}/pickled.pt", "trust": True}),
    "what a module of ours imports": lambda d: (
        "lirpa_ext.models.loading:importlib.import_module", {"name": "antigravity"}
    ),
    "a user's callable by the name of a network": lambda d: (
        "lirpa_ext.models.architectures:build", {"network": "os:getcwd"}
    ),
    "another module": lambda d: ("os:system", {"command": f"touch {d}/executed"}),
    "an attribute": lambda d: (f"{NAMED}.__globals__", {}),
    "no string": lambda d: (["os:system"], {}),
    "a network of another package": lambda d: (NAMED, {**SMALL, "name": "os:getcwd"}),
    "an image of a terabyte": lambda d: (NAMED, {**SMALL, "input_shape": [1, 10**6, 10**6]}),
    "a million classes": lambda d: (NAMED, {**SMALL, "classes": 10**9}),
    "no shape": lambda d: (NAMED, {**SMALL, "input_shape": "12"}),
    "an unknown field": lambda d: (NAMED, {**SMALL, "hook": "os:system"}),
    "kwargs that are none": lambda d: (NAMED, ["name"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_builds_networks_of_a_fixed_list_alone(name, tmp_path):
    architecture, kwargs = HOSTILE[name](tmp_path)
    torch.save(Execute(tmp_path / "executed"), tmp_path / "pickled.pt")
    content = {"architecture": architecture, "kwargs": kwargs, "state_dict": named_network(**SMALL).state_dict()}
    torch.save(content, tmp_path / "net.pt")
    start = time.process_time()
    with pytest.raises(DataError):
        load_model(tmp_path / "net.pt")
    assert not executed(tmp_path) and time.process_time() - start < 10


class Execute:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


STATES = {
    "a tensor of another shape": lambda state: {**state, "0.bias": torch.zeros(15)},
    "a number in place of a tensor": lambda state: {**state, "0.bias": 3},
    "a missing tensor": lambda state: {key: value for key, value in state.items() if key != "0.bias"},
    "one tensor more": lambda state: {**state, "more": torch.zeros(1)},
    "one number for a whole tensor": lambda state: {**state, "0.weight": torch.zeros(1).expand(16, 1, 4, 4)},
    "a sparse tensor": lambda state: {**state, "0.bias": torch.zeros(16).to_sparse()},
    "no tensors at all": lambda state: [1, 2],
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_dict_that_does_not_fit_is_refused(name, tmp_path):
    state = STATES[name](named_network(**SMALL).state_dict())
    torch.save({"architecture": NAMED, "kwargs": SMALL, "state_dict": state}, tmp_path / "net.pt")
    with pytest.raises(DataError):
        load_model(tmp_path / "net.pt")


def test_a_checkpoint_of_ours_is_read(tmp_path):
    model = named_network(**SMALL).eval()
    save_model(model, tmp_path / "net.pt", NAMED, **SMALL)
    x = torch.rand(2, 1, 12, 12)
    assert torch.equal(load_model(tmp_path / "net.pt")(x), model(x))


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A small file that would unpack to gigabytes; torch itself would read it."""
    save_model(named_network(**SMALL), tmp_path / "net.pt", NAMED, **SMALL)
    with zipfile.ZipFile(tmp_path / "net.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for part in source.infolist():
            data = source.read(part) if part.file_size < 1000 else bytes(10**8)
            bomb.writestr(part.filename, data, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="would unpack to"):
        load_model(tmp_path / "bomb.pt")
