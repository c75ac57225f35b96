"""`collect`: collects the results in the folder of a run, a folder of results, or a model file into a `Page`.

Everything is read from files that commands wrote; the network is not evaluated.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..certification.report import Report
from ..errors import DataError, LirpaExtError
from ..importer.inspection import inspect_onnx
from ..models.loading import load_model
from ..reporting.results import read_result
from ..training.learning_curve import plot_metrics, read_metrics
from .page import Fact, Page, Picture, Section, drawn_picture, file_picture, markdown, table

__all__ = ["collect"]

_ROWS = 24  # rows of a table that are shown; the file has all
_DEPTH = 3  # levels of subfolders that are searched
_KNOWN = {"learning_curve.png", "report.png"}  # plots that are drawn anew from the numbers
_UNREADABLE = (
    LirpaExtError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error, yaml.YAMLError,
)  # fmt: skip
_NAMES = {"test": "test split", "validate": "validation samples"}


def collect(target: str | Path, others: Sequence[str | Path] = (), title: str = "") -> Page:
    """Collect results from files into a page.

    Args:
        target: Folder of ``lirpa-ext fit`` or ``sweep``; folder that ``certify``, ``analyze`` or ``study`` wrote by
            ``--out``; or a model file, ``.onnx`` or a checkpoint.
        others: Further folders whose results belong on the same page, default none.
        title: Title of the page, default one made from the configuration or the path.

    Returns:
        The page. Files that are corrupt are named at its end.

    Raises:
        DataError: A path does not exist, or there is nothing that a page could show.
    """
    path = Path(target)
    folders = [*([path] if path.is_dir() else []), *(Path(other) for other in others)]
    for needed in (path, *folders):
        if not needed.exists():
            raise DataError(f"there is no {needed}: give the folder of a run or of results, or a model file")
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: further results come from folders")
    facts: list[Fact] = []
    broken: list[tuple[Path, str]] = []
    sections: list[Section] = []
    if not path.is_dir():
        sections += _attempt(_network, path, broken)
    for folder in folders:
        sections += _results(folder, facts, broken, path if folder != path else None)
    if not sections:
        read = "".join(f" {file.name}: {reason}." for file, reason in broken)
        raise DataError(
            f"{path} has nothing to show: no config.yaml, metrics.csv, certification or analysis.{read} "
            "`lirpa-ext fit`, `certify --out` and `analyze --out` write them"
        )
    if broken:
        rows = [{"file": str(file), "reason": reason} for file, reason in broken]
        sections.append(Section("Left out", ("These files could not be read.",), tables=(table("Files", rows),)))
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Page(title or _title(path), tuple(facts), tuple(sections), f"Made of {path.resolve().name} on {today} by")


def _attempt(read: Callable[[Path], list[Section]], path: Path, broken: list[tuple[Path, str]]) -> list[Section]:
    """Sections of a file; none if the file is missing, or broken, which is added to `broken`."""
    if not path.is_file():
        return []
    try:
        return read(path)
    except (
        LirpaExtError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        broken.append((path, f"{type(error).__name__}: {error}"))
        return []


def _results(folder: Path, facts: list[Fact], broken: list[tuple[Path, str]], beside: Path | None) -> Iterator[Section]:
    """Sections of a folder, certifications first; `facts` and `broken` are extended."""
    suffix = f" ({folder.name})" if beside is not None else ""
    files = sorted(_files(folder))
    claimed: set[Path] = set()

    def certification(path: Path) -> list[Section]:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = content.keys() if isinstance(content, dict) else set()
        if not keys >= {"meta", "summary", "records"} and not keys >= {"meta", "summary", "accuracies"}:
            return []
        place = _place(path, folder) + suffix
        claimed.update((path, path.with_suffix(".png")))
        if "accuracies" in keys:  # the network is randomized
            made, found = _ensemble(content, f"Robust accuracy{place}")
        else:
            report = Report.load(path)
            made, found = _certification(report, f"Certification{place}"), _facts(report.summary(), report.meta)
        if not facts:
            facts.extend(found)
        return [made]

    def analysis(path: Path) -> list[Section]:
        result = read_result(path)
        if path in claimed or result is None:
            return []
        image = path.with_suffix(".png")
        claimed.update((path, image))
        name = " ".join(path.relative_to(folder).with_suffix("").parts).replace("_", " ") + suffix
        return [_analysis(result, name, image if image.is_file() else None)]

    documents = [path for path in files if path.suffix == ".json" and path.name != "environment.json"]
    for path in sorted(documents, key=lambda path: (path.stem != "test", path)):
        yield from _attempt(certification, path, broken)
    yield from _attempt(_sweep, folder / "sweep.csv", broken)
    yield from _attempt(_learning, folder / "metrics.csv", broken)
    failed = {path for path, _ in broken}
    for path in documents:
        if path not in failed:
            yield from _attempt(analysis, path, broken)
    claimed.add(folder / "sweep.png")
    images = [p for p in files if p.suffix == ".png" and p.name not in _KNOWN and p not in claimed]
    pictures: list[Picture] = []
    for path in images:
        try:
            pictures.append(file_picture(path, caption=path.relative_to(folder).as_posix()))
        except LirpaExtError as error:
            broken.append((path, str(error)))
    if pictures:
        yield Section(f"Pictures{suffix}", pictures=tuple(pictures))
    yield from _attempt(_network, folder / "model.pt", broken)
    if (folder / "config.yaml").is_file():
        yield from _attempt(_card, folder / "README.md", broken)
    yield from _attempt(_configuration, folder / "config.yaml", broken)
    yield from _attempt(_environment, folder / "environment.json", broken)


def _files(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Files in a folder and its subfolders, without hidden folders and those of other runs or of TensorBoard."""
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif depth and path.name[0] != "." and path.name != "tensorboard" and not (path / "config.yaml").is_file():
            yield from _files(path, depth - 1)


def _place(path: Path, folder: Path) -> str:
    """Part of a certification's title: ", " and the split, or the path of its file in the folder."""
    parts = path.relative_to(folder).with_suffix("").parts
    name = _NAMES.get(path.stem) or " ".join(parts[:-1] if parts[-1] == "report" else parts)
    return name and f", {name}"


# --- Each function below makes a section. ---


def _certification(report: Report, title: str) -> Section:
    meta = report.meta
    rows = [
        {"eps": row["eps"]}
        | {f"{name} %": None if row[key] is None else f"{100 * row[key]:.2f}" for name, key in _ACCURACIES.items()}
        | {key: row[key] for key in ("certified", "attacked", "unknown", "error")}
        for row in report.summary()
    ]
    made = table("Accuracies and counts", rows)
    made = type(made)(made.caption, made.columns, made.rows, (True,) * len(made.columns))
    said = (
        f"{len(report.records)} samples, l{float(meta['norm']):g} ball, method {meta['method']} in {meta['dtype']}, "
        f"{meta['model']}. Verified: the margin has a positive lower bound over the whole ball. PGD is an attack: the "
        "robust accuracy lies between the two."
    )
    several = len(rows) > 1 or meta.get("radius")
    return Section(title, (said,), (drawn_picture(report.figure()),) if several else (), (made,))


_ACCURACIES = {"clean": "clean", "PGD": "pgd", "verified": "verified"}


def _ensemble(content: dict[str, Any], title: str) -> tuple[Section, list[Fact]]:
    """Section and facts of a randomized network, of which nothing is verified."""
    meta, rows = content["meta"], content["accuracies"]
    said = f"{meta['samples']} samples, {meta['method']}. Nothing is verified of a randomized network."
    return Section(title, (said,), tables=(table("Accuracies", rows),)), _facts(content["summary"], meta)


def _facts(summary: list[dict[str, Any]], meta: dict[str, Any]) -> list[Fact]:
    """Accuracies at the largest eps, for the top of the page."""
    row = max(summary, key=lambda row: row["eps"])
    ball = f"l{float(meta['norm']):g} eps {row['eps']:.4g}" if "norm" in meta else f"eps {row['eps']:.4g}"
    named = (
        ("verified", f"verified accuracy, {ball}"),
        ("pgd", f"accuracy under PGD, {ball}"),
        ("clean", "clean accuracy"),
    )
    facts = [Fact(f"{100 * row[key]:.1f} %", name) for key, name in named if row[key] is not None]
    return [*facts, Fact(str(meta["samples"]), "samples")]


def _analysis(result: dict[str, Any], name: str, image: Path | None) -> Section:
    summary, rows = result["summary"], result["rows"]
    alt = "" if image is None else file_picture(image).alt
    pictures = () if image is None else (file_picture(image, alt if "says nothing" not in alt else summary or alt),)
    said = [summary] if summary else []
    same = {key: rows[0][key] for key in rows[0] if all(row[key] == rows[0][key] for row in rows)} if rows else {}
    if len(rows) > 1 and same:  # a column that never changes is a sentence
        said.append(
            "In all rows: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in same.items()) + "."
        )
        rows = [{key: value for key, value in row.items() if key not in same} for row in rows]
    tables = (table(result["analysis"], rows, _ROWS),) if rows and rows[0] else ()
    return Section(name[:1].upper() + name[1:], tuple(said), pictures, tables)


def _learning(path: Path) -> list[Section]:
    rows = read_metrics(path)
    if not rows:
        return []
    names = list(dict.fromkeys(key for row in rows for key in row))
    shown = [{name: row.get(name) for name in names} | {"epoch": int(row["epoch"]) + 1} for row in rows]
    return [Section("Training", (), (drawn_picture(plot_metrics(rows)),), (table("By epoch", shown, _ROWS),))]


def _sweep(path: Path) -> list[Section]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    image = path.with_suffix(".png")
    alt = "Standard accuracy of each run of the sweep against its robust accuracy, from verified to PGD."
    pictures = (file_picture(image, alt),) if image.is_file() else ()
    return [Section("Sweep", (), pictures, (table("Runs", rows),) if rows else ())]


def _network(path: Path) -> list[Section]:
    """Section with the operations of an ONNX file, or the layers of another model file."""
    if path.suffix == ".onnx" or path.suffixes[-2:] == [".onnx", ".gz"]:
        found = inspect_onnx(path, methods=())
        nodes = [
            {
                "operation": op,
                "name": name,
                "output": "–" if shape is None else " × ".join(str(n or "?") for n in shape),
            }
            for op, name, shape in found.nodes
        ]
        said = f"ONNX, opset {found.opset}, by {found.producer or 'an unknown exporter'}, {found.parameters:,} weights."
        refused = (f"It cannot be bounded: {found.refusal}",) if found.refusal else ()
        return [Section("Network", (said, *refused), tables=(table("Operations", nodes, 2 * _ROWS),))]
    model = load_model(path)
    rows = [
        {
            "layer": name or "(whole)",
            "kind": _kind(layer),
            "weights": sum(p.numel() for p in layer.parameters(recurse=False)),
        }
        for name, layer in model.named_modules()
        if not list(layer.children())
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    return [Section("Network", (f"{total:,} weights.",), tables=(table("Layers", rows, 2 * _ROWS),))]


def _kind(layer: nn.Module) -> str:
    return re.sub(r"\s+", " ", repr(layer))[:100]


def _card(path: Path) -> list[Section]:
    return [Section("Model card", html=markdown(path.read_text(encoding="utf-8")))]


def _configuration(path: Path) -> list[Section]:
    text = path.read_text(encoding="utf-8")
    yaml.safe_load(text)
    return [Section("Configuration", code=text.strip())]


def _environment(path: Path) -> list[Section]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [{"setting": key.replace("_", " "), "value": str(value)} for key, value in content.items()]
    return [Section("Environment", tables=(table("Versions and machine", rows),))]


def _title(path: Path) -> str:
    try:
        model = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))["model"]
        network, loss = model["network"]["name"], model["loss"]["name"]
        return f"{network} trained with the {loss} loss, l{float(model['norm']):g} eps {model['eps']}"
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return f"Report of {path.resolve().name}"
