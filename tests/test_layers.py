"""Folders are layers: each imports from those below it alone, and no modules import each other in a circle."""

from __future__ import annotations

import graphlib
import importlib
import sys
from pathlib import Path

import pytest

import lirpa_ext
from lirpa_ext._moved import MOVED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from structure import imported, name_of

ROOT = Path(lirpa_ext.__file__).parent
# From the ground up.
LAYERS = (
    "_version", "_torchvision", "errors", "extensions", "engine", "domain", "randomized", "rules", "nodes", "passes",
    "methods", "module", "importer", "verification", "data", "attacks", "reporting", "certification", "models",
    "training", "analysis", "cli", "_moved",
)  # fmt: skip
TOUCHING = ("engine", "nodes")  # the engine


MODULES = {name_of(path, ROOT.parent): path for path in ROOT.rglob("*.py")}
GRAPH = {name: imported(path, name, set(MODULES)) for name, path in MODULES.items()}


def layer(name: str) -> str:
    return name.split(".")[1] if name.count(".") else name


@pytest.mark.parametrize("folder", LAYERS)
def test_a_layer_imports_from_below(folder):
    below = {"lirpa_ext", *LAYERS[: LAYERS.index(folder) + 1]}
    above = {
        f"{name} imports {other}"
        for name in MODULES
        if layer(name) == folder
        for other in GRAPH[name]
        if other.startswith("lirpa_ext") and (layer(other) not in below or other == "lirpa_ext")
    }
    assert not above


def test_no_circle():
    """Also none by an import within a function. A package's own modules may be imported before it is complete."""
    known = {name: {other for other in GRAPH[name] if other in MODULES and other != name} for name in MODULES}
    for name in known:  # a module is in its package, which runs first, but does not need it
        known[name] -= {package for package in known if name.startswith(f"{package}.")}
    list(graphlib.TopologicalSorter(known).static_order())


def test_few_names_at_the_top():
    names = {path.stem for path in ROOT.iterdir() if path.name[0] not in "_." and path.name != "py.typed"}
    assert names | {"_version", "_moved", "_torchvision"} == set(LAYERS)
    assert len(names) <= 20


def test_only_two_folders_touch_the_engine():
    touching = {name for name in MODULES if any(other.partition(".")[0] == "auto_LiRPA" for other in GRAPH[name])}
    assert {layer(name) for name in touching} <= set(TOUCHING)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_found_and_names_the_new_one(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"lirpa_ext.{old}", raising=False)
    function = old in lirpa_ext.__all__  # such as `certify`, which stays one
    with pytest.warns(DeprecationWarning, match=f"has moved to lirpa_ext.{MOVED[old]}"):
        module = importlib.import_module(f"lirpa_ext.{old}")
    new = importlib.import_module(f"lirpa_ext.{MOVED[old]}")
    public = [name for name in vars(new) if name[0] != "_"]
    assert public and all(getattr(module, name) is getattr(new, name) for name in public)
    assert callable(module) == function
    if function:
        vars(lirpa_ext).pop(old, None)
        assert getattr(lirpa_ext, old) is getattr(new, old)


def test_the_tests_mirror_the_package():
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name[0] not in "_."}
    assert folders - {"fuzz", "hostile"} <= set(LAYERS)
