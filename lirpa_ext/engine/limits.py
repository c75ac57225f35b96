"""Limits on the time and the memory of a computation that knows of neither."""

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
except ImportError:  # no Unix
    resource = None  # type: ignore[assignment]


_GRACE = 1.0  # seconds
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "alloc_failed")  # the last of CUDA's libraries


class OutOfTime(BaseException):
    """A deadline has passed. No Exception: code that takes any Exception for a failure of its own lets it pass."""


class Deadline(TorchFunctionMode):
    """Within it, the first torch function called after a deadline raises `OutOfTime` in place of running.

    So a computation stops after at most one torch function, in whatever thread, and no other is disturbed. What then
    cleans up behind it (`torch.no_grad` is left by a torch function) has a second to do so.

    Args:
        end: Deadline on the clock, in seconds; infinite for none.
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
    """Let the process take only so many more bytes: allocations beyond fail, where else the machine might die.

    The limit is on the address space of the whole process, other threads included. Where the system has no such
    limit (no Linux), nothing is done.

    Args:
        most: Bytes; None for no limit.
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
    """Let torch compute on one thread: on small tensors others cost more than they give, and a thread has a clock."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory() -> int | None:
    """Bytes that the machine, or the container, still has; None where the system does not tell."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        free.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return min(free, default=None)


def spare_memory() -> int | None:
    """Half of what is free, which a computation may take by default."""
    free = available_memory()
    return free and free // 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, here or in what the error was raised from; on the host torch's is RuntimeError."""
    while error is not None:
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
            return True
        error = error.__cause__
    return False
