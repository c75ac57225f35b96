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

TESTS = Path(__file__).resolve().parent
TABLES = {kind: importlib.import_module(f"hostile.{kind}") for kind in KINDS}


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


def complaint(result, folder, words):
    """What is wrong with one outcome, or None."""
    if "died" in result:
        return f"it hangs, crashes or takes too much memory: {result['died']}"
    error = result["error"]
    if not result["ours"]:
        return f"an error that is not ours: {error}"
    if list(folder.rglob("executed")):
        return "it ran code"
    if result["seconds"] >= SECONDS or result["peak"] >= BYTES:
        return f"{result['seconds']:.1f} s, {result['peak'] / 2**30:.1f} GiB"
    if words is None:
        return error and f"a good file is refused: {error}"
    if error is None:
        return "it is read as if nothing was wrong"
    if not re.search(words, error):
        return f"other words: {error[:1000]}"
    return "nobody reads that much" if len(error) >= 2000 else None


def complaints(kind, cases, folder):
    found = run([f"{kind}/{name}" for name in cases], folder)
    judged = {name: complaint(found[f"{kind}/{name}"], folder / kind / name, cases[name][1]) for name in cases}
    return {name: words for name, words in judged.items() if words}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused(kind, tmp_path):
    assert not complaints(kind, TABLES[kind].CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(TABLES[kind], "SLOW")])
def test_files_that_would_take_long_are_refused_in_time(kind, tmp_path):
    assert not complaints(kind, TABLES[kind].SLOW, tmp_path)


def test_code_would_leave_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Execute(tmp_path)))
    assert (tmp_path / "executed").exists()


def test_there_are_enough():
    assert sum(len(table.CASES) for table in TABLES.values()) >= 100
