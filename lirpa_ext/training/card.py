"""The model card of a run: network, data, loss and schedule of the training, its results, and their limits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from ..reporting.files import write_whole

__all__ = ["write_card"]


_CERTIFIED = [
    "Verified: the margin has a positive lower bound over the whole ball (sound norms, float64).",
    "PGD is an attack: the robust accuracy lies between the two.",
    "",
    "## Limits",
    "",
    "Certificates hold for the norm and the eps of the table, for inputs like those of the data set, and for the",
    "network in `model.pt` and `model.onnx` computed in the precision that was certified. They say nothing of",
    "other perturbations.",
]
_RANDOMIZED = [
    "The network draws its weights or noise anew at every call. Accuracies are those of an ensemble of draws that the",
    "attack (PGD: EOT-PGD here) has not seen.",
    "",
    "## Limits",
    "",
    "Nothing is verified: a stronger attack may find more. There is no ONNX file, which would hold one draw for ever.",
]


def write_card(folder: Path) -> None:
    """Write the model card, ``README.md``, from the other files in the folder of a run.

    Args:
        folder: Folder of the run, with ``config.yaml`` and ``environment.json``; ``metrics.csv``, ``test.json`` and
            ``validate.json`` are read if they exist.

    Raises:
        ResultsError: The file cannot be written.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    model, data = config["model"], config["data"]
    network, loss = model["network"], model["loss"]
    randomized = network.get("randomized", "")
    ran = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    lines = [
        f"# {network['name']} trained with the {loss['name']} loss, l{float(model['norm']):g} eps {model['eps']}",
        "",
        f"* Network: {network['name']}, images of shape {network['input_shape']}, {network['classes']} classes; "
        f"normalization inside: mean {network['mean']}, std {network['std']}."
        + (f" Randomized: {randomized}, {_compact(network['options'])}." if randomized else ""),
        f"* Data: {_described(data)}. Pixels in {model['data_range']}; eps is in these units.",
        f"* Loss: {_compact(loss)}; schedule (epochs): {_compact(model['schedule'])}.",
        f"* Optimizer: {_compact(model['optimizer'])}; {config['trainer']['max_epochs']} epochs.",
        f"* Seeds: {config['seed']} (weights, steps); environment: {_compact(ran)}.",
        "",
        "## Results",
        "",
        "| samples | eps | clean % | PGD % | verified % | method |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("validate", "test"):
        path = folder / f"{name}.json"
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            meta = report["meta"]
            lines += [
                f"| {meta['samples']}, {name} | {row['eps']:.6g} | {_percent(row['clean'])} | {_percent(row['pgd'])} | "
                f"{_percent(row['verified'])} | {meta['method']}, {meta['dtype']} |"
                for row in report["summary"]
            ]
    best = best_row(folder)
    if best is not None:
        lines.append(
            f"| validation, after epoch {int(best['epoch']) + 1} (the checkpoint's choice: optimistic) | | "
            f"{_percent(best['val_clean'])} | {_percent(best['val_pgd'])} | {_percent(best['val_verified'])} | |"
        )
    lines += ["", *(_RANDOMIZED if randomized else _CERTIFIED)]
    write_whole(folder / "README.md", "\n".join(lines) + "\n")


def best_row(folder: Path) -> dict[str, str] | None:
    """The row of ``metrics.csv`` of the epoch whose weights ``best.ckpt`` holds; None if no epoch was judged."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ramp_done"] == "True" and judged(row)]
    return max(rows, key=lambda row: (float(judged(row)), float(row["val_clean"])), default=None)


def judged(row: dict[str, str]) -> str:
    """The accuracy by which a checkpoint is chosen: verified, or under PGD where nothing is verified; "" for none."""
    return row["val_verified"] or row["val_pgd"]


def _described(data: dict[str, Any]) -> str:
    return f"{data['class_path'].rpartition('.')[2]}, {_compact(data.get('init_args') or {})}"


def _compact(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())


def _percent(value: Any) -> str:
    return "-" if value in (None, "") else f"{100 * float(value):.2f}"
