"""The source's qualitative findings on tightness, activity and Lipschitz constants, on MNIST networks trained here.

Trains seven small networks (runs that are there go on or are taken as they are), looks at them, prints a table with
what the source says, what came out and whether it agrees, and writes ``benchmarks/findings.json`` and the table in
``docs/analyses.md``. About half an hour on one core, most of it training.

    python benchmarks/findings.py --data data/mnist [--runs runs/findings] [--samples 200]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lirpa_ext.training.runs import fit, parse

ROOT = Path(__file__).resolve().parent.parent
# Configuration and losses of each group.
GROUPS = {
    "mnist_bcp_reference": ("bcp", "lipschitz", "natural"),
    "mnist_slope_reference": ("sparse-slope", "ibp", "crown-ibp", "cap-ibp"),
}
CALLBACKS = "[{class_path: lirpa_ext.analysis.LipschitzConstants}, {class_path: lirpa_ext.analysis.ReluActivity}]"


def train(data: str, folder: Path) -> dict[str, Path]:
    """Fit each network, or take it from its folder; folders by group and loss."""
    runs = {}
    for group, losses in GROUPS.items():
        for loss in losses:
            run = folder / f"{group}_{loss}"
            runs[f"{group} {loss}"] = run
            if (run / "model.pt").is_file():
                continue
            print(f"training {run.name} ...", flush=True)
            config = parse([
                "--config", str(ROOT / "configs" / f"{group}.yaml"), "--model.loss.name", loss, "--run", str(run),
                "--data.source", data, "--model.evaluation.attack_steps", "0", "--trainer.callbacks", CALLBACKS,
                "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
            ])  # fmt: skip
            fit(config)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MNIST's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/findings"))
    arguments = parser.parse_args()
    train(arguments.data, arguments.runs)
