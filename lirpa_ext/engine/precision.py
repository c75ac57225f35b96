"""Products at the precision of their type: no TF32 and no bfloat16 behind float32 while bounds are computed.

`torch.set_float32_matmul_precision("high")`, which Lightning recommends on GPUs with tensor cores, and by default
cuDNN's convolutions, round the factors of float32 products to 10 bits of mantissa. Outward rounding
(`lirpa_ext.domain.rounding`) counts on 23, and bounds without it would be wrong in their third or fourth digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_backends: Any = torch.backends
# Where torch keeps the precision of float32 products, and the value that leaves their factors as they are.
PLACES: tuple[Any, ...]
NAME: str
FULL: Any
if hasattr(_backends, "fp32_precision"):  # torch 2.9
    PLACES = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.mkldnn.matmul, _backends.mkldnn.conv)
    NAME, FULL = "fp32_precision", "ieee"
else:
    PLACES, NAME, FULL = (_backends.cuda.matmul, _backends.cudnn), "allow_tf32", False


def settings() -> list[Any]:
    """What torch is set to in each of `PLACES`."""
    return [getattr(place, NAME) for place in PLACES]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products of float32 factors, whatever torch is set to; its settings come back at the end."""
    before = settings()
    try:
        for place in PLACES:
            setattr(place, NAME, FULL)
        yield
    finally:
        for place, value in zip(PLACES, before, strict=True):
            setattr(place, NAME, value)
