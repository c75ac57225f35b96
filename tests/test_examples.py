"""Every example runs as its first lines say, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in EXAMPLES if name != "demo.py"])
def test_example_runs(script: str) -> None:
    assert run(script)


def test_demo_runs_to_the_end(tmp_path: Path) -> None:
    printed = run("demo.py", "--quick", "--out", str(tmp_path))
    for name in ("digits.pt", "digits.onnx", "verified_accuracy.png", "lipschitz.json", "bcp.json", "bcp-crown.json"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in printed
    tables = {method: json.loads((tmp_path / f"{method}.json").read_text()) for method in ("bcp", "bcp-crown")}
    for bcp, crown in zip(tables["bcp"]["summary"], tables["bcp-crown"]["summary"], strict=True):
        assert bcp["verified"] <= crown["verified"] <= crown["pgd"] <= crown["clean"]
        assert bcp["error"] == crown["error"] == 0
