"""The pictures of analyses.md, by ``lirpa-ext analyze`` on networks for the digits.

    python docs/analysis_pictures.py [--runs runs/findings] [--sweep sweeps/digits]

The networks are those of ``benchmarks/findings.py``; those that are not there are trained first, and so is the sweep.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from findings import train  # noqa: E402

from lirpa_ext.cli import main  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
SWEEP = (
    "--eps", "0.3,0.5,0.7", "--losses", "bcp,lipschitz", "--out", "{sweep}", "--", "--config",
    str(ROOT / "configs" / "digits_bcp.yaml"), "--trainer.max_epochs", "25", "--model.evaluation.attack_steps", "0",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
)  # fmt: skip
COMMANDS = {
    "outer": ("{l2}_bcp", "--sample", "3"),
    "tightness": ("{l2}_bcp", "--limit", "200"),
    "curves": ("{l2}_bcp", "{l2}_lipschitz", "--limit", "200", "--eps", "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"),
    "trade-off": ("{sweep}",),
    "lipschitz": ("{l2}_bcp", "{l2}_lipschitz", "{l2}_natural"),
    "activity": ("{linf}_crown-ibp", "--limit", "200"),
    "slopes": ("{linf}_sparse-slope", "--limit", "200", "--eps", "0.01,0.025,0.05,0.1,0.2"),
    "training-activity": ("{linf}_sparse-slope", "{linf}_ibp", "{linf}_crown-ibp", "{linf}_cap-ibp"),
}


def draw() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/findings"))
    parser.add_argument("--sweep", type=Path, default=Path("sweeps/digits"))
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for group in ("l2", "linf"):
        if any(f"{{{group}}}" in text for name in arguments.only for text in COMMANDS[name]):
            train(f"digits {group}", arguments.runs)
    places = {"l2": arguments.runs / "digits_l2", "linf": arguments.runs / "digits_linf", "sweep": arguments.sweep}
    if "trade-off" in arguments.only and main(["sweep", *(text.format(**places) for text in SWEEP)]):
        sys.exit("the sweep failed")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            given = [text.format(**places) for text in COMMANDS[name]]
            if main(["analyze", name, *given, "--out", folder]):
                sys.exit(f"analyze {name} failed")
            shutil.copy(Path(folder) / f"{name}.png", PICTURES / f"{name}.png")


if __name__ == "__main__":
    draw()
