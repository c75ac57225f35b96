"""Products at the precision of their type: no TF32 and no bfloat16 behind float32 while bounds are computed.

``torch.set_float32_matmul_precision("high")``, which Lightning recommends on GPUs with tensor cores, makes products of
float32 round their factors to 10 bits of mantissa; cuDNN's convolutions do so by default. Outward rounding
(`lirpa_ext.domain.rounding`) assumes 23 bits, and bounds without it would be wrong in their third or fourth digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_backends: Any = torch.backends
# Torch's modules with a setting for the precision of float32 products, its name, and its value for full precision.
PLACES: tuple[Any, ...]
NAME: str
FULL: Any
if hasattr(_backends, "fp32_precision"):  # torch 2.9
    PLACES = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.mkldnn.matmul, _backends.mkldnn.conv)
    NAME, FULL = "fp32_precision", "ieee"
else:
    PLACES, NAME, FULL = (_backends.cuda.matmul, _backends.cudnn), "allow_tf32", False


def settings() -> list[Any]:
    """Torch's setting of the precision of float32 products in each of `PLACES`."""
    return [getattr(place, NAME) for place in PLACES]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without rounding their factors, and restore torch's settings at the end."""
    before = settings()
    try:
        for place in PLACES:
            setattr(place, NAME, FULL)
        yield
    finally:
        for place, value in zip(PLACES, before, strict=True):
            setattr(place, NAME, value)
