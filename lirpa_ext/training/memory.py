"""Memory of a training step that stays with the process for the next one."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory of the CPU for the next step, from now on and in all of the process.

    glibc gives the large tensors of a step back to the kernel when they are freed, which then clears their pages anew
    for each step: a seventh of a CROWN-IBP step on MNIST Small. The process then stays as large as its largest step.
    `lirpa-ext fit` does this; a library should not, so nothing else here does.

    Returns:
        Whether the C library took the setting; other ones than glibc do not have it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions refuse a threshold over 32 MiB.
    mapped = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
