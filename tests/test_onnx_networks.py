"""Real networks: those of VNN-COMP, Marabou, ERAN and others that convert as they are, bounded and attacked."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from soundness import TOLERANCE, assert_contains, extremes
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.errors import DataError, TraceError, UnsupportedNodeError
from lirpa_ext.loading import load_model

_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "onnx"
NAMES = [
    "acas_1_1", "acas_1d", "burn_mnist16", "cntk_mnist8", "eran_relu_9x200", "lsnc_state", "mar_dropout", "mar_leaky",
    "marabou_cifar_large", "matlab_logsig", "mnist_fc_256x2", "nn4sys_mscn128", "oval_base_gather", "resnet_2b",
    "tll_small", "verivital_maxpool", "vit_ibp",
]  # fmt: skip

# Networks that our methods must bound, on either engine.
MUST_BOUND = {
    "burn_mnist16", "eran_relu_9x200", "mar_dropout", "marabou_cifar_large", "mnist_fc_256x2", "resnet_2b",
}  # fmt: skip
OURS = ("bcp", "bcp-crown")
ENGINES = ("IBP", "CROWN")
EPS = {2: 0.05, math.inf: 0.005}
outcomes: dict[tuple[str, str, str, str], str] = {}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what became of each network (with -s)."""
    yield
    columns = sorted({key[1:] for key in outcomes})
    print("\n" + " " * 22 + "  ".join("/".join(column) for column in columns))
    for name in NAMES:
        cells = [outcomes.get((name, *column), "-") for column in columns]
        if set(cells) != {"-"}:
            widths = [len("/".join(column)) for column in columns]
            print(f"{name:22s}" + "  ".join(f"{c[:w]:{w}s}" for c, w in zip(cells, widths, strict=True)))


@functools.cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    """The network and its first recorded input; skips where it cannot be had."""
    if not _FOLDER.is_dir():
        pytest.skip(f"the networks are not there ({_FOLDER})")
    record = next(entry for entry in json.loads((_FOLDER / "manifest.json").read_text())["models"]
                  if entry["name"] == name)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(_FOLDER / record["file"])
    stored = np.load(_FOLDER / record["io"])
    return model, stored
