"""Real networks, of VNN-COMP, Marabou, ERAN and others: imported, checked against onnxruntime, bounded and attacked."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from soundness import Extremes, assert_contains, extremes
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, ImportedModel, PerturbationLpNorm, load_onnx

_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "onnx"
NAMES = [
    "acas_1_1", "acas_1d", "burn_mnist16", "cntk_mnist8", "eran_relu_9x200", "lsnc_state", "mar_dropout", "mar_leaky",
    "marabou_cifar_large", "matlab_logsig", "mnist_fc_256x2", "nn4sys_mscn128", "oval_base_gather", "resnet_2b",
    "tll_small", "verivital_maxpool", "vit_ibp",
]  # fmt: skip

OURS = ("bcp", "bcp-crown")
ENGINES = ("IBP", "CROWN-IBP", "CROWN")
EPS = {2: 0.05, math.inf: 0.005}
outcomes: dict[tuple[str, tuple[str, ...]], str] = {}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what became of each network (with -s)."""
    yield
    columns = [(m, f"l{n:g}", d) for m in OURS for n in EPS for d in ("float64", "float32")]
    columns += [(m, "l2", "float64") for m in ENGINES]
    print("\nmean width of the bounds")
    print(" " * 20 + "".join(f"{' '.join(column):>24s}" for column in columns))
    for name in NAMES:
        whole = outcomes.get((name, ("",)))
        cells = [whole] if whole else [f"{outcomes.get((name, column), '-'):>23s}" for column in columns]
        print(f"{name:21s}" + " ".join(cells))


@functools.cache
def network(name: str) -> tuple[ImportedModel, Tensor, float]:
    """The network, two recorded inputs, and the scale of its inputs."""
    if not _FOLDER.is_dir():
        pytest.skip(f"the networks are not there ({_FOLDER})")
    record = record_of(name)
    stored = np.load(_FOLDER / record["io"])
    x = torch.from_numpy(stored["X"])
    model = load_onnx(_FOLDER / record["file"])
    return model, x[:2].reshape(2, *model.input_shape), float(x.abs().max())


def record_of(name: str) -> dict[str, Any]:
    records = json.loads((_FOLDER / "manifest.json").read_text())["models"]
    return next(entry for entry in records if entry["name"] == name)


def note(name: str, outcome: str, *column: str) -> None:
    """Remember an outcome for the table."""
    outcomes[name, column or ("",)] = outcome


@functools.cache
def graph_of(name: str, dtype: torch.dtype) -> tuple[nn.Module, BoundedModule, Tensor, float]:
    """The network and its graph in that dtype."""
    model, x, scale = network(name)
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    return model, BoundedModule(model, x), x, scale


def perturbation_of(norm: float, scale: float, x: Tensor) -> PerturbationLpNorm:
    eps = EPS[norm] * min(scale, 255.0) * torch.tensor([1.0, 0.5], dtype=x.dtype)[: len(x)]
    return PerturbationLpNorm(norm=norm, eps=eps)


@functools.cache
def found_on(name: str, norm: float, dtype: torch.dtype) -> Extremes:
    model, _, x, scale = graph_of(name, dtype)
    return extremes(model, x, perturbation_of(norm, scale, x), count=30, steps=4, batched=len(x) > 1)


def bound(name: str, method: str, norm: float, dtype: torch.dtype) -> None:
    """Bound the network and hold the bounds against what was found."""
    _, graph, x, scale = graph_of(name, dtype)
    column = (method, f"l{norm:g}", str(dtype).removeprefix("torch."))
    try:
        lower, upper = graph.compute_bounds(x=(BoundedTensor(x, perturbation_of(norm, scale, x)),), method=method)
    except Exception as error:
        if method in OURS:
            raise
        note(name, type(error).__name__, *column)  # the engine raises whatever comes
        pytest.skip(f"{type(error).__name__}: {str(error)[:150]}")
    note(name, "violated", *column)
    assert torch.isfinite(lower).all() and torch.isfinite(upper).all()
    assert_contains((lower, upper), found_on(name, norm, dtype), f"({name}, {column})")
    note(name, f"{float((upper - lower).mean()):.3g}", *column)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", OURS)
def test_our_bounds_hold(name, norm, dtype, method):
    bound(name, method, norm, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ENGINES)
def test_engine_bounds_hold_in_l2(name, method):
    if method == "CROWN" and name in ("marabou_cifar_large", "vit_ibp", "cntk_mnist8"):
        pytest.skip("takes the engine 20 s and more")
    bound(name, method, 2, torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_imported_networks_give_the_recorded_outputs(name):
    model, _, _ = network(name)
    stored = np.load(_FOLDER / record_of(name)["io"])
    x, y = torch.from_numpy(stored["X"]), torch.from_numpy(stored["Y"])
    with torch.no_grad():
        found = model(x.reshape(len(x), *model.input_shape))
    torch.testing.assert_close(found, y.reshape(found.shape), rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    assert model.batch_size is None and model.check.batch_sizes == (1, 3)
