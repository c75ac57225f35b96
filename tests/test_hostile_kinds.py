"""Files made to do harm: each is refused in words of ours, runs nothing, reads nothing outside, and takes little."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import KINDS
from hostile.child import BYTES, SECONDS

TESTS = Path(__file__).resolve().parent
TABLES = {kind: importlib.import_module(f"hostile.{kind}") for kind in KINDS}
QUICK = [(kind, name) for kind in KINDS for name in TABLES[kind].CASES]
SLOW = [(kind, name) for kind in KINDS for name in getattr(TABLES[kind], "SLOW", {})]


def run(kind, names, folder, slow=False):
    """Outcomes by name, from one child; where a case ends it, another goes on behind that case."""
    found = {}
    while left := [name for name in names if name not in found]:
        arguments = [sys.executable, "-m", "hostile.child", *(["--slow"] if slow else []), kind, str(folder), *left]
        path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found |= {line["name"]: line for line in lines}
        if done.returncode and len(lines) < len(left):
            found[left[len(lines)]] = {"died": f"{done.returncode}: {done.stderr[-2000:]}"}
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcome of a case; the first of a kind reads all of them."""
    known, folders = {}, {}

    def outcome(kind, name, slow=False):
        if (kind, slow) not in known:
            folders[kind, slow] = tmp_path_factory.mktemp(kind)
            names = list(TABLES[kind].SLOW if slow else TABLES[kind].CASES)
            known[kind, slow] = run(kind, names, folders[kind, slow], slow)
        return known[kind, slow][name], folders[kind, slow] / name

    return outcome


def check(result, folder, words):
    assert "died" not in result, f"it hangs, crashes or takes too much memory: {result}"
    assert result["ours"], f"an error that is not ours: {result['error']}"
    assert not list(folder.rglob("executed")), "it ran code"
    assert result["seconds"] < SECONDS and result["peak"] < BYTES
    if words is None:
        assert result["error"] is None, f"a good file is refused: {result['error']}"
    else:
        assert result["error"] is not None, "it is read as if nothing was wrong"
        assert re.search(words, result["error"]), result["error"][:1000]
        assert len(result["error"]) < 2000, "nobody reads that much"


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_hostile_files_are_refused(outcomes, kind, name):
    check(*outcomes(kind, name), TABLES[kind].CASES[name][1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), SLOW)
def test_files_that_would_take_long_are_refused_in_time(outcomes, kind, name):
    check(*outcomes(kind, name, slow=True), TABLES[kind].SLOW[name][1])


def test_there_are_enough():
    assert len(QUICK) + len(SLOW) >= 100 and {kind for kind, _ in QUICK} == set(KINDS)
