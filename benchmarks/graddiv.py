"""Adv-BNN with and without GradDiv on MNIST, several seeds: is EOT weaker where gradients are more diverse?

    python benchmarks/graddiv.py --data FOLDER [--seeds 0 1 2] [--out FOLDER] [-- more arguments of lirpa-ext fit]

Trains configs/mnist_adv-bnn_reference.yaml, as it is and with GradDiv, and evaluates on the first test images with
draws that the attack has not seen: the source's EOT-PGD, 20 steps of eps / 4, 20 draws a gradient, from the clean
image as there, and from a random point. A run that was stopped goes on; results are in FOLDER, and when all are there
the table of docs/graddiv.md is written from them; that of another training, by more arguments, is only printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lirpa_ext.attacks import EOT, PGD
from lirpa_ext.certification import evaluate
from lirpa_ext.data import load_data
from lirpa_ext.randomized import gradients, von_mises_fisher
from lirpa_ext.training.checkpoints import read_checkpoint
from lirpa_ext.training.runs import fit, parse

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "mnist_adv-bnn_reference.yaml"
KINDS = {
    "Adv-BNN": [],
    "Adv-BNN + GradDiv": ["--model.loss.graddiv", "kappa", "--model.schedule.graddiv", "[0, 0.25]"],
}
EPS = [0.0, 0.3, 0.36]
FROM_RANDOM = EOT(PGD(20, step_size=0.25, loss="cross-entropy"), 20)  # the source's attack, but for its start
DRAWS = 100  # of the gradients' statistics, as in the source


def run(kind: str, seed: int, data: str, samples: int, folder: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train, or go on, and evaluate; or what a finished run wrote."""
    place = folder / f"{'graddiv' if KINDS[kind] else 'plain'}_{seed}"
    result = place / "result.json"
    given = ["--config", str(CONFIG), "--data.source", data, "--run", str(place), "--seed", str(seed), *KINDS[kind]]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false"]
    module = fit(parse([*given, *quiet, *more]))  # refuses the folder of another configuration
    asked = {"samples": samples, "steps": read_checkpoint(place / "last.ckpt")["global_step"], "draws": DRAWS}
    if result.is_file():
        row = json.loads(result.read_text(encoding="utf-8"))
        if row.get("asked") == asked:
            return row
    model = module.model.eval().requires_grad_(False)
    x, y = load_data(data, "test", samples)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(x.split(100), y.split(100), strict=True)
    found = torch.cat([gradients(model, *pair, DRAWS, generator, create_graph=False) for pair in pairs], dim=1)
    directions = von_mises_fisher(found)
    accuracy = evaluate(model, (x, y), EPS, seed=seed)
    harder = evaluate(model, (x, y), EPS[1:], FROM_RANDOM, seed=seed)
    row = {
        "kind": kind,
        "seed": seed,
        "samples": len(x),
        "rho": float(directions.rho.mean()),
        "kappa/d": float(directions.printed.mean() / found.shape[2]),
        "gradient length": float(found.norm(dim=2).mean()),
        **{f"eps {level.eps:g}": level.ensemble.value for level in accuracy.levels},
        **{f"one draw, eps {level.eps:g}": level.single.value for level in accuracy.levels},
        **{f"random start, eps {level.eps:g}": level.ensemble.value for level in harder.levels},
        "attacks": [accuracy.attack, harder.attack],
        "asked": asked,
    }
    result.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each run, and the means."""
    accuracies = [f"{start}eps {eps:g}" for eps in EPS for start in ("", "random start, ") if eps or not start]
    heads = ["network", "seed", "rho", "kappa / d", *(f"{name} %" for name in accuracies)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        mean = {key: statistics.mean(row[key] for row in chosen) for key in ("rho", "kappa/d", *accuracies)}
        for name, row in [*((str(row["seed"]), row) for row in chosen), ("**mean**", mean)]:
            percents = " | ".join(f"{100 * row[key]:.1f}" for key in accuracies)
            lines.append(f"| {kind} | {name} | {row['rho']:.3f} | {row['kappa/d']:.2f} | {percents} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, and write the table when all seeds are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MNIST's four IDX files")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1000, help="test images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "graddiv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "graddiv.md")
    parser.add_argument("more", nargs="*", help="arguments of lirpa-ext fit, after --")
    arguments = parser.parse_args()
    rows = [
        run(kind, seed, arguments.data, arguments.samples, arguments.out, arguments.more)
        for seed in arguments.seeds
        for kind in KINDS
    ]
    written = table(rows)
    print(written)
    if arguments.more:
        return
    start, end = "<!-- experiment: start -->", "<!-- experiment: end -->"
    page = arguments.page.read_text(encoding="utf-8")
    before, after = page.partition(start)[0], page.partition(end)[2]
    arguments.page.write_text(f"{before}{start}\n\n{written}\n\n{end}{after}", encoding="utf-8")
    (ROOT / "benchmarks" / "graddiv.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
