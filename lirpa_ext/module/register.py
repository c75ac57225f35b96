"""`register`, which adds the methods of this package to the engine's own BoundedModule."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.norms import NormCache, PowerIteration
from ..domain.perturbation import PerturbationLpNorm
from ..engine.precision import full_precision
from ..errors import OptionError, TraceError, UnsupportedNodeError
from ..methods import BoundOptions, Graph, check_options, find_method, is_ours, method_of, run_method
from ..methods.engine_methods import check_covered
from ..methods.substitutes import request
from .samples import check_batch_apart
from .threads import one_at_a_time
from .tracing import as_tuple, check_inputs, check_nodes, plain, with_our_perturbation

_original: Any = None
_original_init: Any = None
_differs: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # graph -> how its outputs differ from the model's
_apart: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # graph -> batch size that was checked last
_norms: WeakKeyDictionary[nn.Module, tuple[NormCache, dict[str, PowerIteration]]] = WeakKeyDictionary()


@one_at_a_time
def register() -> None:
    """Give `compute_bounds` of the engine's own BoundedModule the methods of this package.

    For code that builds the engine's class: ``compute_bounds(x=(bounded_x,), C=C, method="bcp")`` then works, with the
    methods' options as further keyword arguments. Idempotent; undone by `unregister`. Methods of the engine are still
    run by the engine: for lp balls, if its list covers the graph (`lirpa_ext.engine.positive_list`), and else they
    raise UnsupportedNodeError, where `lirpa_ext.BoundedModule` would use operators of its own. Graphs that are built
    from now on are compared with their models; of older graphs, only the shape of the outputs is checked.
    """
    global _original, _original_init
    if _original is not None:
        return
    _original, _original_init = engine.EngineBoundedModule.compute_bounds, engine.EngineBoundedModule.__init__

    @functools.wraps(_original)
    def compute_bounds(
        self: nn.Module, x: Any = None, aux: Any = None, C: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        method = kwargs.get("method", args[0] if args else "backward")
        if hasattr(self, "source"):
            return _original(self, x, aux, C, *args, **kwargs)
        if not is_ours(method):
            return _engine_bounds(self, method, x, aux, C, args, kwargs)
        if x is None or aux is not None or len(args) > 1:
            raise OptionError(f"method {method!r} on the engine's own class needs x, and its options by name")
        kwargs.pop("method", None)
        return _compute_bounds(self, x, C, method, **kwargs)

    @functools.wraps(_original_init)
    def init(self: nn.Module, model: Any, global_input: Any, *args: Any, **kwargs: Any) -> None:
        _original_init(self, model, global_input, *args, **kwargs)
        if not _package(self) and not _package(model):
            _compare(self, model, as_tuple(global_input))

    engine.EngineBoundedModule.compute_bounds = compute_bounds
    engine.EngineBoundedModule.__init__ = init


@one_at_a_time
def unregister() -> None:
    """Undo `register`: give the engine's BoundedModule its own methods back."""
    global _original, _original_init
    if _original is not None:
        engine.EngineBoundedModule.compute_bounds, engine.EngineBoundedModule.__init__ = _original, _original_init
        _original = _original_init = None


def _package(module: Any) -> bool:
    """Whether an object is of a class of this package, such as `BoundedModule`, which does its own checks."""
    return type(module).__module__.partition(".")[0] == "lirpa_ext"


@one_at_a_time
def _compare(graph: Any, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Compare a graph of the engine's own class with its model, and note in `_differs` how they differ."""
    if model.training or not all(isinstance(x, Tensor) for x in inputs):
        return
    source = torch.Generator().manual_seed(0)
    with engine.untouched(model), full_precision(), torch.no_grad():
        for size in (0.0, 0.1, 1.0):
            points = [plain(x) for x in inputs]
            if size:
                points = [
                    x + size * torch.randn(x.shape, generator=source).to(x) if x.is_floating_point() else x
                    for x in points
                ]
            expected, found = model(*points), graph(*points)
            if not isinstance(expected, Tensor) or expected.shape != found.shape:
                break  # `_check_graph` compares the shapes
            scale = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else torch.ones(())
            off = (found - expected).abs() > torch.finfo(expected.dtype).eps ** 0.5 * scale
            off |= found.isfinite() != expected.isfinite()
            if off.any():
                _differs[graph] = f"it gives {float(found[off][0]):.6g} in place of {float(expected[off][0]):.6g}"
    engine.free_graphs(graph)


def _engine_bounds(module: Any, method: Any, x: Any, aux: Any, C: Any, args: Any, kwargs: Any) -> Any:
    """Run a method of the engine, if its list covers the graph; calls of the engine to itself are not checked."""
    if x is None or module.__dict__.get("_lirpa_ext_inside"):
        return _original(module, x, aux, C, *args, **kwargs)
    inputs = as_tuple(x)
    kinds = {type(getattr(tensor, "ptb", None)) for tensor in inputs} - {type(None)}
    if kinds <= {engine.EnginePerturbationLpNorm, PerturbationLpNorm}:  # other sets are not checked
        check_covered(module, inputs, request(method, kwargs))
        _check_graph(module, inputs)
    module.__dict__["_lirpa_ext_inside"] = True
    try:
        return _original(module, x, aux, C, *args, **kwargs)
    finally:
        del module.__dict__["_lirpa_ext_inside"]


@one_at_a_time
def _check_graph(module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Raise TraceError for a graph whose samples depend on each other, or that differs from its model."""
    if module in _differs:
        raise TraceError(
            f"the engine's graph computes something else than the model ({_differs[module]}): a layer lost one of its "
            "options. lirpa_ext.BoundedModule says which"
        )
    if _apart.get(module) == len(inputs[0]):
        return
    with engine.untouched(module), full_precision(), torch.no_grad():
        values = tuple(plain(x) for x in inputs)
        check_batch_apart(module, values)
        found, expected = module(*values).shape[1:], module.final_shape[1:]
        check_nodes(module._modules.values())
        engine.free_graphs(module)
        if found != expected:
            raise TraceError(
                f"the engine's graph gives outputs of shape {(len(values[0]), *found)}, and the model of "
                f"{(len(values[0]), *expected)}: a layer lost one of its options. lirpa_ext.BoundedModule says which"
            )
    _apart[module] = len(inputs[0])


@one_at_a_time
def _compute_bounds(
    module: nn.Module,
    x: Any,
    C: Tensor | None,
    method: str,
    bound_lower: bool = True,
    bound_upper: bool = True,
    **options: Any,
) -> Any:
    check_options(method, find_method(method), options)
    inputs = tuple(with_our_perturbation(tensor) for tensor in as_tuple(x))
    check_inputs(module, inputs)
    _check_graph(module, inputs)
    if engine.reads_old_values(engine.ancestors_in_order(module.final_node())):  # type: ignore[operator]
        raise UnsupportedNodeError(
            f"method {method!r}: auto_LiRPA {engine.engine_version()} computes a layer normalization without its eps, "
            "so that bounds of its graph are not the model's. lirpa_ext.BoundedModule has it right"
        )
    slopes = [engine.slope_below_zero(node) for node in module._modules.values()]
    if not all(0 <= slope <= 1 for slope in slopes):
        raise UnsupportedNodeError(f"method {method!r}: a LeakyReLU's slope leaves [0, 1], where no bound holds")
    cache, power_iterations = _norms.setdefault(module, (NormCache(), {}))
    with engine.untouched(module), full_precision():
        graph = Graph(module, cache, power_iterations, module.training)
        asked = BoundOptions(method, C, bound_lower, bound_upper)
        return run_method(graph, method_of(method, options), inputs, asked).sides
