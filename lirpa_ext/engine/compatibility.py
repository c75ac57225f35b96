"""The engine, auto_LiRPA: its classes and functions, each under one name whichever version is installed.

Works with auto_LiRPA 0.3 (the registry's only release) and 0.7.x (upstream's repository). This module holds what
differs between the two, and puts back what 0.3 needs of older releases of torch and numpy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper
from torch import Tensor

from ..errors import EngineError

INSTALL_COMMAND = "pip install --no-deps auto-LiRPA==0.3 && pip install appdirs graphviz ninja packaging pyyaml tqdm"


def _bridge_torch_and_numpy() -> None:
    """Give the engine the three names of older torch and numpy that it imports; replace nothing that exists."""
    try:
        importlib.import_module("numpy.lib.arraysetops")
    except ImportError:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.isin = np.isin  # type: ignore[attr-defined]
        sys.modules["numpy.lib.arraysetops"] = module
    if not hasattr(torch.onnx.symbolic_helper, "_set_opset_version"):
        exporter_globals = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals").GLOBALS

        def set_opset_version(version: int) -> None:
            exporter_globals.export_onnx_opset_version = version

        torch.onnx.symbolic_helper._set_opset_version = set_opset_version  # type: ignore[attr-defined]
    if not hasattr(torch._C.Node, "__getitem__"):
        torch._C.Node.__getitem__ = lambda node, key: getattr(node, node.kindOf(key))(key)  # type: ignore
    for opset in range(11, 21):  # torch registers only the opsets that were imported
        with contextlib.suppress(ImportError):
            importlib.import_module(f"torch.onnx.symbolic_opset{opset}")


def _import_engine() -> Any:
    _bridge_torch_and_numpy()
    level, handlers = logging.root.level, logging.root.handlers[:]
    try:
        with warnings.catch_warnings(record=True):  # the engine sets a global filter, and warns, on import
            return importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise EngineError(
            f"lirpa_ext needs the auto_LiRPA engine, which could not be imported ({error}). Install it with:\n"
            f"    {INSTALL_COMMAND}\n"
            "(--no-deps: its own pins exclude every current torch), or put a checkout of auto_LiRPA 0.7.x on "
            "the PYTHONPATH."
        ) from error
    finally:  # 0.7 configures the root logger
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers


_limit = sys.getrecursionlimit()
auto_LiRPA = _import_engine()
bound_general = importlib.import_module("auto_LiRPA.bound_general")
bound_ops = importlib.import_module("auto_LiRPA.bound_ops")
_perturbations = importlib.import_module("auto_LiRPA.perturbations")
_linear_bound = importlib.import_module("auto_LiRPA.linear_bound")
_patches = importlib.import_module("auto_LiRPA.patches")
_utils = importlib.import_module("auto_LiRPA.utils")

if sys.getrecursionlimit() >= 1_000_000:  # set by the engine; recursion that deep would crash the interpreter
    sys.setrecursionlimit(max(_limit if _limit < 1_000_000 else 0, 20_000))  # enough for the deepest networks

EngineBoundedModule: Any = auto_LiRPA.BoundedModule
BoundedTensor: Any = auto_LiRPA.BoundedTensor
EnginePerturbationLpNorm: Any = auto_LiRPA.PerturbationLpNorm
Bound: Any = bound_ops.Bound
BoundInput: Any = bound_ops.BoundInput
BoundParams: Any = bound_ops.BoundParams
BoundBuffers: Any = bound_ops.BoundBuffers
BoundRelu: Any = bound_ops.BoundRelu
BoundLinear: Any = bound_ops.BoundLinear
BoundConv: Any = bound_ops.BoundConv
Interval: Any = bound_ops.Interval
LinearBound: Any = _linear_bound.LinearBound
Patches: Any = _patches.Patches
eyeC: Any = _utils.eyeC
register_custom_op = importlib.import_module("auto_LiRPA.bound_op_map").register_custom_op
unregister_custom_op = importlib.import_module("auto_LiRPA.bound_op_map").unregister_custom_op

# 0.7 renamed `root_name` to `root_names`, `_set_input` to `set_input`, and made bounds properties of a node.
IS_LEGACY = not hasattr(EngineBoundedModule, "set_input")

engine_compute_bounds: Any = EngineBoundedModule.compute_bounds  # the engine's own, before `lirpa_ext.register`

ENGINE_METHODS = frozenset(
    {
        "ibp", "ibp+backward", "ibp+crown", "crown-ibp", "crown", "backward", "forward", "forward+backward",
        "forward+crown", "crown-optimized", "alpha-crown", "forward-optimized", "dynamic-forward",
        "dynamic-forward+backward", "dynamic-forward+crown",
    }
)  # fmt: skip

OPTIMIZED_METHODS = frozenset({"crown-optimized", "alpha-crown", "forward-optimized"})


def engine_version() -> str:
    """Version of the installed engine, e.g. ``"0.7.1"``."""
    version = getattr(auto_LiRPA, "__version__", None)
    return version or importlib.metadata.version("auto-LiRPA")


def patches_to_matrix(patches: Any, input_shape: torch.Size) -> Tensor:
    """The engine's convolutional coefficients (its "patches") as dense coefficient rows.

    Args:
        patches: Coefficients in the engine's patches form.
        input_shape: Shape of the node's input, (B, C, H, W).

    Returns:
        (B, S, C, H, W), with S the number of rows.
    """
    return _patches.patches_to_matrix(
        patches.patches, input_shape, patches.stride, patches.padding, patches.output_shape, patches.unstable_idx
    )


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect the engine's error messages in a list instead of printing them; they name the unknown operations."""
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            messages.append(record.getMessage())
            return False
        return True

    _utils.logger.addFilter(collect)
    try:
        yield messages
    finally:
        _utils.logger.removeFilter(collect)
