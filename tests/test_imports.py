"""What importing the package does, and does not do."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

import lirpa_ext


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_nothing_with_it():
    run("import sys, lirpa_ext; assert not {'torch', 'numpy', 'auto_LiRPA', 'lightning'} & set(sys.modules)")


@pytest.mark.parametrize(
    "order", itertools.permutations(["lightning.pytorch", "torchvision.ops", "lirpa_ext"]), ids=str
)
def test_the_order_of_imports_does_not_matter(order):
    """A torchvision that was built for another torch is repaired whoever imports it first."""
    for name in order:
        if name != "lirpa_ext":
            pytest.importorskip(name.partition(".")[0])
    run(f"import {', '.join(order)}; lirpa_ext.BoundedModule; import onnx2torch")


@pytest.mark.parametrize("first", ["", "import torch.onnx, torch.export\n"])
def test_global_switches_stay_as_they_are(first):
    """Nothing but the names that the engine needs of an older torch, and the recursion limit that the engine raises."""
    switches = (
        "torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(), "
        "torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), "
        "torch.initial_seed(), torch.get_rng_state().sum().item(), warnings.filters[:], os.environ.copy(), "
        "os.getcwd(), signal.getsignal(signal.SIGINT), resource.getrlimit(resource.RLIMIT_AS), logging.root.level, "
        "numpy.geterr(), sys.excepthook"
    )
    run(
        "import logging, numpy, os, resource, signal, sys, torch, warnings\n"
        f"{first}torch.manual_seed(3)\nbefore = [{switches}]\nfrom lirpa_ext import *\nafter = [{switches}]\n"
        "different = [(a, b) for a, b in zip(before, after) if a != b]\nassert not different, different"
    )


def test_every_public_name_is_there():
    for name in lirpa_ext.__all__:
        assert getattr(lirpa_ext, name) is not None
        assert name in dir(lirpa_ext)
    assert set(lirpa_ext._MODULES) == set(lirpa_ext.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lirpa_ext.nothing
