"""Files made to do harm, kind by kind: each is refused in words of ours, runs nothing, and takes little."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import KINDS
from hostile.arrays import Execute
from hostile.child import BYTES, SECONDS

pytestmark = pytest.mark.slow  # a minute; test_hostile_files.py has one of each kind

TESTS = Path(__file__).resolve().parent
TABLES = {kind: importlib.import_module(f"hostile.{kind}") for kind in KINDS}
QUICK = [(kind, name) for kind in KINDS for name in TABLES[kind].CASES]
SLOW = [(kind, name) for kind in KINDS for name in getattr(TABLES[kind], "SLOW", {})]


def run(cases, folder):
    """Outcomes by case, from one child; where a case ends it, another goes on behind that case."""
    found = {}
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    while left := [case for case in cases if case not in found]:
        arguments = [sys.executable, "-m", "hostile.child", str(folder), *left]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found |= {line["case"]: line for line in lines}
        if len(lines) < len(left):
            found[left[len(lines)]] = {"died": f"{done.returncode}: {done.stderr[-2000:]}"}
    return found


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Outcomes of the cases that were asked for, and the folder above theirs."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    cases = [f"{item.callspec.params['kind']}/{item.callspec.params['name']}" for item in here]
    folder = tmp_path_factory.mktemp("hostile")
    return run(cases, folder), folder


def check(found, folder, kind, name, words):
    result = found[f"{kind}/{name}"]
    assert "died" not in result, f"it hangs, crashes or takes too much memory: {result}"
    assert result["ours"], f"an error that is not ours: {result['error']}"
    assert not list((folder / kind / name).rglob("executed")), "it ran code"
    assert result["seconds"] < SECONDS and result["peak"] < BYTES
    if words is None:
        assert result["error"] is None, f"a good file is refused: {result['error']}"
    else:
        assert result["error"] is not None, "it is read as if nothing was wrong"
        assert re.search(words, result["error"]), result["error"][:1000]
        assert len(result["error"]) < 2000, "nobody reads that much"


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_hostile_files_are_refused(outcomes, kind, name):
    check(*outcomes, kind, name, TABLES[kind].CASES[name][1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), SLOW)
def test_files_that_would_take_long_are_refused_in_time(outcomes, kind, name):
    check(*outcomes, kind, name, TABLES[kind].SLOW[name][1])


def test_code_would_leave_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Execute(tmp_path)))
    assert (tmp_path / "executed").exists()


def test_there_are_enough():
    assert len(QUICK) + len(SLOW) >= 100 and {kind for kind, _ in QUICK} == set(KINDS)
