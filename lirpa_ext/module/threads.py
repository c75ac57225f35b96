"""A lock that lets one thread at a time build graphs and compute bounds.

Torch's default dtype and its settings of float32 products, the engine's logger, and the globals of torch's ONNX
tracer belong to the whole process. They are changed while a graph is built or bounds are computed, so that a second
thread would get bounds of the wrong dtype or precision; it waits for the first one instead.

Torch's inference mode is left meanwhile: optimized bounds need gradients, which inference mode does not allow.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

LOCK = threading.RLock()


def one_at_a_time(function: _Function) -> _Function:
    """Decorator of functions of which one thread at a time may run any; they may call each other.

    Args:
        function: The function.

    Returns:
        The function under `LOCK`, outside of torch's inference mode.
    """

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with LOCK, _no_inference_mode():
            return function(*args, **kwargs)

    return alone  # type: ignore[return-value]


@contextlib.contextmanager
def _no_inference_mode() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
