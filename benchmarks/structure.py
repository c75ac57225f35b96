"""How the package is built, in figures: modules, imports, circles, lines, and how often one call crosses files.

    python benchmarks/structure.py [FOLDER OF ANOTHER CHECKOUT]

An import counts wherever it stands, but for types alone. A crossing is a call from one file to another.
"""

from __future__ import annotations

import ast
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "lirpa_ext"


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, name: str, known: set[str]) -> set[str]:
    """Modules that a module imports, wherever in it, but for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(inner) for node in typing for inner in ast.walk(node)}
    found: set[str] = set()
    for node in (node for node in ast.walk(tree) if id(node) not in left_out):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            whole = {f"{module}.{alias.name}" for alias in node.names}
            found |= {full if full in known else module for full in whole}
    return found


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """Those of the package, without a module's own package."""
    found = imported(path, name, known)
    return {other for other in found if other in known and other != name and not name.startswith(f"{other}.")}


def unit(name: str) -> str:
    """The name at the top that a module belongs to."""
    return ".".join(name.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            found.append(part)

    for name in graph:
        if name not in index:
            visit(name)
    return [part for part in found if len(part) > 1]


def levels(graph: dict[str, set[str]], parts: list[set[str]]) -> int:
    """Longest chain of imports, circles taken as one."""
    home = {name: k for k, part in enumerate(parts) for name in part}
    below: dict[object, set[object]] = collections.defaultdict(set)
    for name, others in graph.items():
        below[home.get(name, name)] |= {home.get(other, other) for other in others} - {home.get(name, name)}
    depth: dict[object, int] = {}

    def deep(unit: object) -> int:
        if unit not in depth:
            depth[unit] = 1 + max((deep(other) for other in below[unit]), default=0)
        return depth[unit]

    return max(deep(unit) for unit in list(below))


def code_lines(path: Path) -> int:
    """Lines of a file that hold code: no docstring, no comment, no empty line."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings = [
        statement
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    ]
    left_out = {line for string in strings for line in range(string.lineno, (string.end_lineno or 0) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and k not in left_out for k, line in lines)


def structure(root: Path) -> dict[str, object]:
    paths = sorted((root / PACKAGE).rglob("*.py"))
    names = {name_of(path, root): path for path in paths}
    graph = {name: imports(path, name, set(names)) for name, path in names.items()}
    parts = circles(graph)
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    units: dict[str, set[str]] = collections.defaultdict(set)
    for name, others in graph.items():
        units[unit(name)] |= {unit(other) for other in others} - {unit(name)}
    top = {path.stem for path in (root / PACKAGE).iterdir() if path.name[0] not in "_." and path.name != "py.typed"}
    return {
        "names at the top": len(top),
        "modules": len(names),
        "imports between them": sum(map(len, graph.values())),
        "levels": levels(graph, parts),
        "circles of modules": [len(part) for part in parts],
        "circles of names at the top": [len(part) for part in circles({k: units[k] for k in list(units)})],
        "lines": text.count("\n"),
        "lines of code, without docstrings and comments": sum(code_lines(path) for path in paths),
        "longest file": max(path.read_text(encoding="utf-8").count("\n") for path in paths),
        "Any": len(re.findall(r"\bAny\b", text)),
        "except Exception": len(re.findall(r"except Exception", text)),
    }


CALLS = """
import json, sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, certify, load_onnx

ROOT = sys.argv.pop()
HOME = str(Path(lirpa_ext.__file__).parent)

def crossings(call):
    count = 0
    def event(frame, kind, _):
        nonlocal count
        back = frame.f_back
        if kind == "call" and back is not None:
            here, there = frame.f_code.co_filename, back.f_code.co_filename
            count += here.startswith(HOME) and there.startswith(HOME) and here != there
    sys.setprofile(event)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 10)
    )

found = {}
model, x = network(), torch.rand(2, 1, 8, 8)
for method in ("bcp", "bcp-crown", "cap"):
    bounded = BoundedModule(model, x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1))
    bounded.compute_bounds(ball, method=method)
    found[f"compute_bounds({method!r})"] = crossings(lambda: bounded.compute_bounds(ball, method=method))
y = model(x).argmax(1)
found["certify"] = crossings(lambda: certify(model, (x, y), norm=2, eps=0.1, method="bcp", progress=False))
folder = Path(tempfile.mkdtemp())
torch.onnx.export(model, (x[:1],), folder / "n.onnx", dynamo=False, verbose=False)
load_onnx(folder / "n.onnx")
found["load_onnx"] = crossings(lambda: load_onnx(folder / "n.onnx"))
from lirpa_ext.cli import main
def fit():
    done = main([
        "fit", "--config", ROOT + "/configs/digits_bcp.yaml", "--run", str(folder / "run"),
        "--model.schedule.warmup", "1", "--model.schedule.ramp", "1", "--trainer.max_epochs", "3",
        "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
    ])
    assert done == 0
found["fit, 6 steps"] = crossings(fit)
print(json.dumps(found))
"""


def calls(root: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "calls.py"
        script.write_text(CALLS, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script), str(root)], cwd=folder, env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    root = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parents[1])
    for name, value in (structure(root) | calls(root)).items():
        print(f"{name:46} {value}")


if __name__ == "__main__":
    main()
