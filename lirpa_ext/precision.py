"""Products at the precision of their type: no TF32 and no bfloat16 behind float32 while bounds are computed.

`torch.set_float32_matmul_precision("high")`, which Lightning recommends on GPUs with tensor cores, and by default
cuDNN's convolutions, round the factors of float32 products to 10 bits of mantissa. Outward rounding
(`lirpa_ext.rounding`) counts on 23, and bounds without it would be wrong in their third or fourth digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_products: Any = torch.backends
# Where torch keeps the precision of float32 products, and the value that leaves them as they are.
SETTINGS: list[tuple[Any, str, Any]] = (
    [
        (_products.cuda.matmul, "fp32_precision", "ieee"),
        (_products.cudnn.conv, "fp32_precision", "ieee"),
        (_products.mkldnn.matmul, "fp32_precision", "ieee"),
        (_products.mkldnn.conv, "fp32_precision", "ieee"),
    ]
    if hasattr(_products, "fp32_precision")  # torch 2.9
    else [(_products.cuda.matmul, "allow_tf32", False), (_products.cudnn, "allow_tf32", False)]
)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products of float32 factors, whatever torch is set to; its settings come back at the end."""
    before = [(place, name, getattr(place, name)) for place, name, _ in SETTINGS]
    try:
        for place, name, value in SETTINGS:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
