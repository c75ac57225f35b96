"""Fixtures that the test files share."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from lirpa_ext.engine import precision

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


# Of these, which take minutes together, `make test` runs every so-many-th, and `make test-slow` the rest.
THINNED = {
    "test_rules.py::test_rule_is_sound_and_methods_are_ordered": 3,
    "test_structure.py::test_every_method_is_sound_or_refuses": 2,
    "test_numerics.py::test_every_function_at_every_size": 2,
    "test_numerics.py::test_a_ball_that_leaves_the_domain_bounds_nothing": 2,
    "test_attacks.py::test_every_attack_stays_in_ball_and_range": 2,
    "test_importer.py::test_torch_exports_come_back": 2,
    "test_lowering.py::test_nodes_between_dense_layers": 2,
    "test_survival.py::test_a_killed_run_ends_as_an_unbroken_one": 2,
    "test_survival.py::test_a_users_shuffled_loader_goes_on_where_it_was": 3,
}


# Tests of over a second, which `make quick` leaves out (`long_tests.py`).
LONG = frozenset(Path(__file__).with_name("long.txt").read_text(encoding="utf-8").split())


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the first case of each test, if it takes under a second")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is thinned as slow, and of a quick run keep little."""
    seen = collections.Counter()
    kept = []
    for item in items:
        name = item.nodeid.partition("[")[0].rpartition("/")[2]
        if name in THINNED and seen[name] % THINNED[name]:
            item.add_marker(pytest.mark.slow)
        if not seen[name] and name not in LONG:
            kept.append(item)
        seen[name] += 1
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
