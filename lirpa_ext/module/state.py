"""What a graph has of its model: mode, state dict and parameters; and the deprecated names of its last result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import BoundResult, Relaxation
from .tracing import plain

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelState:
    """The part of `BoundedModule` that hands on to the user's model (`source`)."""

    source: nn.Module
    power_iterations: dict[str, Any]
    last_result: BoundResult | None
    _inside: bool
    _inputs: tuple[Any, ...]

    def train(self, mode: bool = True) -> Self:
        """Put the user's model in training mode, or in eval mode if `mode` is False; the graph stays in eval mode."""
        self.source.train(mode)
        return self

    def eval(self) -> Self:
        """Put the user's model in eval mode."""
        return self.train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """State dict of the model, with the vectors u of the power iterations under ``power_iteration.NAME.u``."""
        state = self.source.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, iteration in self.power_iterations.items():
            state[f"{prefix}power_iteration.{name}.u"] = iteration.u if keep_vars else iteration.u.detach()
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        """Load a state dict that `state_dict` returned, or one of the model alone."""
        if self._inside:  # the engine restores buffers after its forward pass, which changes none in eval mode
            return None
        own = {key: value for key, value in state_dict.items() if not key.startswith("power_iteration.")}
        for name, iteration in self.power_iterations.items():
            saved = state_dict.get(f"power_iteration.{name}.u")
            if saved is not None:
                iteration.load_state_dict({"u": saved})
        return self.source.load_state_dict(own, strict=strict, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters; for a model without any, the engine gets one from which it reads the dtype."""
        own = list(super().parameters(recurse))  # type: ignore[misc]
        if not own and self._inside:
            own = [nn.Parameter(plain(self._inputs[0]).new_zeros(()), requires_grad=False)]
        return iter(own)

    def _named_members(self, get_members_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # 0.3 lacks `remove_duplicate`, without which torch's parameters() fails
        return nn.Module._named_members(self.source, get_members_fn, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Self:
        raise TypeError("a BoundedModule cannot be copied or pickled: save the torch model and build a new one")

    def __reduce__(self) -> Any:
        raise TypeError("a BoundedModule cannot be copied or pickled: save the torch model and build a new one")

    @property
    def fallbacks(self) -> dict[str, str]:
        """Deprecated: `last_result.fallbacks`."""
        return self._last("fallbacks", "fallbacks") or {}

    @property
    def ended_rows(self) -> dict[str, str]:
        """Deprecated: `last_result.ended_rows`."""
        return self._last("ended_rows", "ended_rows") or {}

    @property
    def last_relaxation(self) -> Relaxation | None:
        """Deprecated: `last_result.relaxation`."""
        return self._last("last_relaxation", "relaxation")

    def _last(self, old: str, new: str) -> Any:
        warnings.warn(f"BoundedModule.{old} is last_result.{new} now", DeprecationWarning, stacklevel=3)
        return None if self.last_result is None else getattr(self.last_result, new)
