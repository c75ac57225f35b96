"""Limits on the time and the memory of a computation, which need no support by the computation itself."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

try:
    import resource
except ImportError:  # not on Unix
    resource = None  # type: ignore[assignment]


_GRACE = 1.0  # seconds for cleaning up after a deadline
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "alloc_failed")  # the last by CUDA libraries


class OutOfTime(BaseException):
    """A deadline has passed. A BaseException, so that code that catches every Exception does not swallow it."""


class Deadline(TorchFunctionMode):
    """Context in which the first torch function called after a deadline raises `OutOfTime` in place of running.

    The computation thus stops at its next torch function; other threads are not disturbed. Code that cleans up while
    the exception passes, such as the end of a `torch.no_grad` block, has one more second for its torch functions.

    Args:
        end: Deadline on the clock, in seconds; infinite (default) for none.
        clock: `time.monotonic` (default) for wall time, `time.thread_time` for the processor time of one thread.
    """

    def __init__(self, end: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.end, self.clock = end, clock

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.check()
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise `OutOfTime` if the deadline has passed."""
        now = self.clock()
        if now > self.end:
            self.end = now + _GRACE
            raise OutOfTime


@contextlib.contextmanager
def memory_limit(most: int | None) -> Iterator[None]:
    """Limit the memory that the process may take in addition: allocations beyond fail instead of killing the machine.

    The limit is on the address space of the whole process, other threads included. On systems other than Linux
    nothing is limited.

    Args:
        most: Additional bytes; None for no limit.
    """
    status = Path("/proc/self/statm")
    if most is None or resource is None or not status.exists():
        yield
        return
    taken = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ends = [end for end in (soft, hard, taken + most) if end != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(ends), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: faster for small tensors, and `time.thread_time` then counts all of the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory() -> int | None:
    """Bytes of memory that the machine, or the container if less, still has free; None where this is unknown."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        free.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return min(free, default=None)


def spare_memory() -> int | None:
    """Half of `available_memory`, in bytes: the default limit of a computation; None where this is unknown."""
    free = available_memory()
    return free and free // 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is a failed allocation; on the CPU torch raises a RuntimeError for these."""
    while error is not None:
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
            return True
        error = error.__cause__
    return False
