"""The seam to auto_LiRPA: the only module that touches the engine's internals.

Works with auto_LiRPA 0.3 (the registry's only release) and 0.7.x (upstream's repository). Everything that
differs between the two, and everything that today's torch no longer offers to the older one, is here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import EngineError

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


_limit = sys.getrecursionlimit()
auto_LiRPA = _import_engine()
bound_general = importlib.import_module("auto_LiRPA.bound_general")
bound_ops = importlib.import_module("auto_LiRPA.bound_ops")
_perturbations = importlib.import_module("auto_LiRPA.perturbations")
_linear_bound = importlib.import_module("auto_LiRPA.linear_bound")
_patches = importlib.import_module("auto_LiRPA.patches")
_utils = importlib.import_module("auto_LiRPA.utils")

if sys.getrecursionlimit() >= 1_000_000:  # the engine's; a file that is nested so deeply would crash the interpreter
    sys.setrecursionlimit(max(_limit if _limit < 1_000_000 else 0, 20_000))  # enough for the deepest networks it takes

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

engine_compute_bounds: Any = EngineBoundedModule.compute_bounds  # as it was before anything is registered on it

ENGINE_METHODS = frozenset(
    {
        "ibp", "ibp+backward", "ibp+crown", "crown-ibp", "crown", "backward", "forward", "forward+backward",
        "forward+crown", "crown-optimized", "alpha-crown", "forward-optimized", "dynamic-forward",
        "dynamic-forward+backward", "dynamic-forward+crown",
    }
)  # fmt: skip

OPTIMIZED_METHODS = frozenset({"crown-optimized", "alpha-crown", "forward-optimized"})


def engine_version() -> str:
    """Version of the engine in use, e.g. ``"0.7.1"``."""
    version = getattr(auto_LiRPA, "__version__", None)
    return version or importlib.metadata.version("auto-LiRPA")


def patches_to_matrix(patches: Any, input_shape: torch.Size) -> Tensor:
    """The engine's convolutional coefficients (its "patches") as a matrix, (B, S, C, H, W)."""
    return _patches.patches_to_matrix(
        patches.patches, input_shape, patches.stride, patches.padding, patches.output_shape, patches.unstable_idx
    )


# --- the graph -----------------------------------------------------------------------------------------------


def set_input(module: nn.Module, *x: Tensor) -> None:
    """Put the inputs on the graph's roots and mark which nodes they perturb; drops what the last call left.

    The values become plain tensors: some functions of a `BoundedTensor` give a plain tuple.
    """
    (module._set_input if IS_LEGACY else module.set_input)(*x)  # type: ignore[operator]
    node: Any
    for node in module._modules.values():
        if type(node) is BoundInput and isinstance(node.value, BoundedTensor):
            node.value = node.value.as_subclass(Tensor)


def ancestors_in_order(node: Any) -> list[Any]:
    """All nodes that `node` depends on and itself, inputs before users (0.7's own order is not topological)."""
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(node, False)]
    while stack:
        current, expanded = stack.pop()
        if expanded:
            order.append(current)
        elif id(current) not in seen:
            seen.add(id(current))
            stack.append((current, True))
            stack.extend((parent, False) for parent in current.inputs)
    return order


Snapshot = list[tuple[Any, dict[str, Any]]]

_OF_THE_GRAPH = ("bound_opts", "final_shape", "last_final_node", "last_final_node_name")
_LIVE = ("live", "users", "get_bias", "ball", "slope")  # of a node: set by this package, and kept


def snapshot(module: nn.Module) -> Snapshot:
    """What the engine keeps on the nodes of a graph, to be put back before it runs the next method.

    Slopes, stages and shapes that one method leaves there make others fail, or use what was made for another input.
    """
    kept: Snapshot = [(node, {}) for node in module._modules.values()]
    for node, values in kept:
        values.update({name: _shallow(value) for name, value in node.__dict__.items() if name not in _LIVE})
    options = {name: _shallow(module.__dict__[name]) for name in _OF_THE_GRAPH if name in module.__dict__}
    return [*kept, (module, options)]


def restore(kept: Snapshot) -> None:
    """Put back what `snapshot` kept, and drop what came since, on the nodes."""
    *nodes, (module, options) = kept
    for node, values in nodes:
        for name in [name for name in node.__dict__ if name not in values and name not in _LIVE]:
            del node.__dict__[name]
        node.__dict__.update({name: _shallow(value) for name, value in values.items()})
    module.__dict__.update({name: _shallow(value) for name, value in options.items()})


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


# In matrix mode 0.3's sparse bounds of convolutions are wrong in shape.
_SPARSE = (
    "sparse_intermediate_bounds", "sparse_conv_intermediate_bounds", "sparse_features_alpha", "sparse_spec_alpha",
)  # fmt: skip


def use_matrix_mode(module: Any) -> None:
    """Keep coefficients of images as matrices in backward passes from now on, not as the engine's "patches"."""
    module.conv_mode = "matrix"
    module.bound_opts |= {"conv_mode": "matrix"} | dict.fromkeys(_SPARSE, False)
    for node in module._modules.values():
        if getattr(node, "mode", None) == "patches":
            node.mode = "matrix"
        for name in ("use_sparse_features_alpha", "use_sparse_spec_alpha"):
            if hasattr(node, name):
                setattr(node, name, False)


def weight_scale(node: Any) -> float:
    """Factor alpha of a Gemm node's product."""
    return node.alpha if IS_LEGACY else node.alpha_linear


def bias_scale(node: Any) -> float:
    """Factor beta of a Gemm or matmul node's bias."""
    return node.beta if IS_LEGACY else node.beta_linear


def slope_below_zero(node: Any) -> float:
    """Slope of a ReLU or LeakyReLU node below 0; 0 for other nodes."""
    alpha = getattr(node, "alpha", 0.0)
    return getattr(node, "leaky_alpha", 0.0) or (alpha if isinstance(alpha, float) else 0.0)


def reads_old_values(order: list[Any]) -> bool:
    """Whether a node's forward reads values other than its inputs': 0.3's layer normalization does."""
    return IS_LEGACY and any(
        isinstance(node, bound_ops.BoundDiv) and isinstance(node.inputs[1], bound_ops.BoundSqrt) for node in order
    )


def is_shape(node: Any) -> bool:
    """Whether a node is the shape of another, which 0.3 takes for perturbed where that one is."""
    return isinstance(node, bound_ops.BoundShape)


def aligned_constants(node: Any) -> list[Any]:
    """Constant inputs of a node whose first axis is the batch's wherever they have as many axes as the output."""
    joins = tuple(getattr(bound_ops, f"Bound{name}") for name in ("Add", "Sub", "Mul", "Div", "Concat"))
    stacked = isinstance(node, bound_ops.BoundMatMul) and len(node.output_shape) > 2  # of matrices
    aligned = stacked or isinstance(node, joins)
    return [parent for parent in node.inputs if not parent.perturbed] if aligned else []


def constant(node: Any) -> Tensor:
    """Value of a node that does not depend on a perturbed input (a weight, a shape, a constant)."""
    value = getattr(node, "forward_value", None)
    if value is None:
        value = node.forward(*[constant(parent) for parent in node.inputs])
    return value if isinstance(value, Tensor) else torch.tensor(value)


def forget_values(module: nn.Module) -> None:
    """Drop the clean values of all nodes, so that the next look at one computes it anew."""
    node: Any
    for node in module._modules.values():
        if hasattr(node, "forward_value"):
            del node.forward_value


def free_graphs(module: nn.Module, keep_bounds: bool = False) -> None:
    """Drop the tensors that the engine leaves on its nodes, and with them the autograd graphs they hold.

    Args:
        module: The graph.
        keep_bounds: Keep the nodes' bounds, detached, for those who read them after a call.
    """
    node: Any
    for node in module._modules.values():
        for name in ("interval", "forward_value", "lA", "uA", "linear", "ball"):
            if name in node.__dict__ or name in node._parameters:
                delattr(node, name)
        for name in ("lower", "upper"):
            bound = getattr(node, name, None)
            if not isinstance(bound, Tensor):
                continue
            if keep_bounds:
                setattr(node, name, bound.detach())
            elif IS_LEGACY:  # which asks for hasattr
                delattr(node, name)
            else:
                setattr(node, name, None)
        _detach_attributes(node)
    _detach_attributes(module)


def _detach_attributes(holder: Any) -> None:
    """Cut the graphs of whatever else was left: slopes, intercepts, the last IBP bounds, ..."""
    for name, value in list(holder.__dict__.items()):
        # Of a view that torch.no_grad made, and whose base has changed since, torch refuses to give the grad_fn.
        if isinstance(value, Tensor) and (value._is_view() or value.grad_fn is not None):
            object.__setattr__(holder, name, value.detach())


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters; 0.3's own `parameters()` fails on today's torch."""
    for part in module.modules():
        yield from (parameter for parameter in part._parameters.values() if parameter is not None)


def buffers(module: nn.Module) -> Iterator[Tensor]:
    """All buffers; 0.3's own `buffers()` fails on today's torch."""
    for part in module.modules():
        yield from (buffer for buffer in part._buffers.values() if buffer is not None)


def bound_backward(node: Any, rows: Tensor, start: Any) -> Any:
    """The node's backward bound for the lower side: ([(rows of input, None), ...], bias, 0).

    Args:
        node: The node; the bounds of its inputs are on them (`set_bounds`).
        rows: Coefficients of its output, (S, B, ...).
        start: The node that the pass started from.
    """
    if not IS_LEGACY:
        return node.bound_backward(
            rows, None, *node.inputs, start_node=start, unstable_idx=None, start_shape=rows.shape[:1]
        )
    if isinstance(node, bound_ops.BoundOptimizableActivation):
        return node.bound_backward(rows, None, *node.inputs, start_shape=rows.shape[0], start_node=start)
    return node.bound_backward(rows, None, *node.inputs)


def honest_bias(node: Any, A: Any, bias: Any) -> Any:
    """The engine's `get_bias`, which drops the terms of all samples where one of them is NaN.

    That is meant for 0 * inf, which is 0 here; a NaN stays with its sample.
    """
    total = type(node).get_bias(node, A, bias)
    if isinstance(total, Tensor) or not isinstance(A, Tensor):
        return total
    terms = torch.where((A == 0) & ~bias.isnan(), 0.0, A * bias)
    return terms.reshape(*A.shape[:2], -1).sum(2)


def set_bounds(node: Any, lower: Tensor, upper: Tensor) -> None:
    """Hand bounds to the engine's relaxations, differentiably (its own argument for them detaches)."""
    node.lower, node.upper = lower, upper
    node.interval = (lower, upper)


def learn_relu(module: nn.Module, relu: type) -> None:
    """0.3 keeps an exact-type list of nodes whose intermediate bounds come from IBP."""
    known: Any = module.ibp_intermediate if IS_LEGACY else [relu]
    if relu not in known:
        known.append(relu)


# --- live parameters -----------------------------------------------------------------------------------------


class LiveParams(BoundParams):
    """A parameter node that reads the user's own tensor and never touches its `requires_grad`."""

    live: Tensor

    def forward(self) -> Tensor:
        return self.live


class LiveBuffers(BoundBuffers):
    """A buffer node that reads the user's own tensor: the engine works on a clone made when it was built.

    Serves batch norm's running statistics, and weights computed by a parametrization (spectral norm, weight
    norm), through which gradients then reach the original parameters.
    """

    live: Tensor

    def forward(self) -> Tensor:
        return self.live


def make_live(module: nn.Module, model: nn.Module) -> list[tuple[Any, Callable[[], Tensor]]]:
    """Turn every parameter and buffer node into a reader of `model`'s tensor of the same name.

    Returns:
        (node, reader) pairs for `refresh`, to be called at the start of each computation.
    """
    readers: list[tuple[Any, Callable[[], Tensor]]] = []
    for node in module._modules.values():
        if isinstance(node, BoundParams):
            node.__class__ = LiveParams
        elif isinstance(node, BoundBuffers):
            node.__class__ = LiveBuffers
        else:
            continue
        get = attrgetter(node.ori_name)

        def read(get: Callable[[nn.Module], Tensor] = get) -> Tensor:
            return get(model)

        readers.append((node, read))
    refresh(model, readers)
    return readers


@contextlib.contextmanager
def parametrizations_at_rest(model: nn.Module) -> Iterator[None]:
    """Reading a spectral_norm weight in training mode runs a power step; here it does not."""
    modes = [
        (part, part.training)
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module.modules()
    ]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def refresh(model: nn.Module, readers: list[tuple[Any, Callable[[], Tensor]]], detach: bool = False) -> None:
    """Read the user's tensors once, so that one computation sees one value of each.

    Args:
        model: The user's model.
        readers: What `make_live` returned.
        detach: Cut the graphs of computed weights.
    """
    with parametrizations_at_rest(model):
        values = [read() for _, read in readers]
    for (node, _), value in zip(readers, values, strict=True):
        live = value.detach() if detach and not value.is_leaf else value
        live = live.clone() if live.is_inference() else live  # no gradient goes through what is of inference mode
        object.__setattr__(node, "live", live)  # not nn.Module's, which would register a parameter


# --- what the engine logs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect the engine's error messages in place of printing them: they name the ops that it does not know."""
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


# --- what the engine must not change -------------------------------------------------------------------------


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` and `grad` of every parameter and train/eval mode of every submodule on exit."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None  # alpha-CROWN's ascent goes backward into the weights as well
        yield
    finally:
        for parameter, requires_grad, grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for a while: the engine makes some of its tensors without saying which."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype.is_floating_point else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
