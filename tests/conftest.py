"""Fixtures that the test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lirpa_ext import precision

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared():
    """The folder of reference networks and data beside the repository; tests that need it skip without it."""
    if not _SHARED.is_dir():
        pytest.skip(f"the reference material is not there ({_SHARED})")
    return _SHARED


@pytest.fixture
def tensor_cores():
    """float32 products as Lightning recommends them on GPUs, of rounded factors; torch's settings come back after."""
    before = precision.settings()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in zip(precision.PLACES, before, strict=True):
        setattr(place, precision.NAME, value)
