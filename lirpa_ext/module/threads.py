"""One build or bound computation at a time in a process.

Torch's default dtype and its settings of float32 products, the engine's logger, and the globals of torch's ONNX
tracer belong to the whole process. A graph is built, and bounds are computed, under settings of its own, so a second
thread that did so meanwhile would get bounds of the wrong dtype or precision. It waits here instead.

One of these settings is torch's inference mode, which is left: no gradient goes through its tensors, and bounds that
are optimized need some.
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
    """Let one thread at a time run the function, and all others that are marked so; they may call each other."""

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
