"""`register()`: the methods of this package on the engine's own BoundedModule."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from . import engine
from .errors import OptionError
from .methods import is_ours, run_method
from .norms import NormCache, PowerIteration
from .precision import full_precision
from .tracing import as_tuple, check_inputs, with_our_perturbation

_original: Any = None
_norms: WeakKeyDictionary[nn.Module, tuple[NormCache, dict[str, PowerIteration]]] = WeakKeyDictionary()


def register() -> None:
    """Give `compute_bounds` of the engine's own BoundedModule the methods of this package.

    For code that already builds one: ``compute_bounds(x=(bounded_x,), C=C, method="bcp")`` then works, with the
    methods' options as further keyword arguments. Idempotent; undone by `unregister`. The engine's own methods
    stay the engine's: only `lirpa_ext.BoundedModule` repairs its l2 bounds.
    """
    global _original
    if _original is not None:
        return
    _original = engine.EngineBoundedModule.compute_bounds

    @functools.wraps(_original)
    def compute_bounds(
        self: nn.Module, x: Any = None, aux: Any = None, C: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        method = kwargs.get("method", args[0] if args else None)
        if method is None or not is_ours(method) or hasattr(self, "source"):
            return _original(self, x, aux, C, *args, **kwargs)
        if x is None or aux is not None or len(args) > 1:
            raise OptionError(f"method {method!r} on the engine's own class needs x, and its options by name")
        kwargs.pop("method", None)
        return _compute_bounds(self, x, C, method, **kwargs)

    engine.EngineBoundedModule.compute_bounds = compute_bounds


def unregister() -> None:
    """Undo `register`."""
    global _original
    if _original is not None:
        engine.EngineBoundedModule.compute_bounds = _original
        _original = None


def _compute_bounds(
    module: nn.Module,
    x: Any,
    C: Tensor | None,
    method: str,
    bound_lower: bool = True,
    bound_upper: bool = True,
    **options: Any,
) -> Any:
    inputs = tuple(with_our_perturbation(tensor) for tensor in as_tuple(x))
    check_inputs(module, inputs)
    cache, power_iterations = _norms.setdefault(module, (NormCache(), {}))
    with engine.untouched(module), full_precision():
        return run_method(
            module, method, inputs, C, bound_lower, bound_upper, options, cache, power_iterations, module.training
        )
