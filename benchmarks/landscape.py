"""Which certified loss is smooth to train? The measures of Fig. 3.6 to 3.9 of the source, loss by loss, over seeds.

OMP_NUM_THREADS=1 python benchmarks/landscape.py                               # scikit-learn's digits, minutes
OMP_NUM_THREADS=1 python benchmarks/landscape.py --sparsity                    # Fig. 3.9, lower slopes from sparse on
OMP_NUM_THREADS=1 python benchmarks/landscape.py --data ../shared/data/mnist   # the MNIST reference run

Each run is one of ``lirpa-ext fit`` with the callback `lirpa_ext.analysis.Smoothness`, kept below ``runs/landscape``
and not done again. kappa is 0 and beta 1 throughout: the certified loss alone. The medians are those of the ramp.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import lirpa_ext
from lirpa_ext.analysis import SmoothnessTrace, plot_smoothness
from lirpa_ext.engine import engine_version
from lirpa_ext.reporting.plots import save
from lirpa_ext.training import OBJECTIVES, Objective, register_objective
from lirpa_ext.training.runs import fit, parse

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("ibp", "sparse-slope", "cap-ibp", "crown-ibp")
SPARSITY = ("slope:0,0", "slope:0,0.5", "crown-ibp", "slope:0.5,1", "slope:1,1")  # (p, q); CROWN-IBP's are (0, 1)
MEASURES = ("variation", "gradient_distance", "cosine_distance", "gradient_norm")
EVERY = {"digits": 10, "mnist": 15}
DIGITS = [
    "--config", str(ROOT / "configs" / "digits_bcp.yaml"), "--model.norm", "inf", "--model.eps", "0.1",
    "--model.schedule.warmup", "2", "--model.schedule.ramp", "24", "--model.optimizer.lr", "0.002",
    "--trainer.max_epochs", "28",
]  # fmt: skip
MNIST = ["--config", str(ROOT / "configs" / "mnist_slope_reference.yaml"), "--trainer.max_epochs", "6"]


def trace(source: str, loss: str, seed: int, folder: Path) -> SmoothnessTrace:
    """Smoothness during one run, trained unless it is there."""
    kind = "digits" if source == "digits" else "mnist"
    run = folder / f"{kind}_{loss.replace(':', '_').replace(',', '_')}_{seed}"
    callback = {"class_path": "lirpa_ext.analysis.Smoothness", "init_args": {"every": EVERY[kind]}}
    given = DIGITS if kind == "digits" else [*MNIST, "--data.source", source]
    config = parse([
        *given, "--model.loss.name", loss, "--model.schedule.kappa", "[0, 0]", "--seed", str(seed), "--run", str(run),
        "--trainer.callbacks", json.dumps([callback]), "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--progress", "false", "--model.evaluation.attack_steps", "0",
    ])  # fmt: skip
    fit(config)  # which does nothing where it is finished, and refuses the folder of another configuration
    return SmoothnessTrace.load(run / "smoothness.json")


def row(traces: list[SmoothnessTrace], at: str) -> dict[str, float]:
    """Of each measure the mean over the seeds of its median over the ramp, and the seeds' lowest and highest."""
    found = {}
    for measure in MEASURES:
        medians = [trace.median(measure, at, ramp=True) for trace in traces]
        found |= {measure: statistics.mean(medians), f"{measure}_low": min(medians), f"{measure}_high": max(medians)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def table(results: dict[str, dict[str, dict[str, float]]], at: str) -> str:
    """The results as Markdown."""
    names = " | ".join(f"{measure.replace('_', ' ')}" for measure in MEASURES)
    lines = [f"| loss ({at} eps) | {names} |", "|---" * (len(MEASURES) + 1) + "|"]
    for loss, found in results.items():
        lines.append(f"| `{loss}` | {' | '.join(_cell(found[at], measure) for measure in MEASURES)} |")
    return "\n".join(lines)


def _cell(found: dict[str, float], measure: str) -> str:
    low, high = found[f"{measure}_low"], found[f"{measure}_high"]
    return f"{found[measure]:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")


def main() -> int:
    """Run what is missing; print and write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help='"digits" (default) or a folder with MNIST\'s files')
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsity", action="store_true", help="slopes 1 with chances p and q, in place of the losses")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "landscape")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()
    name = "digits" if arguments.data == "digits" else "mnist"
    losses, name = (SPARSITY, f"{name}_sparsity") if arguments.sparsity else (LOSSES, name)
    for loss in SPARSITY:
        if loss not in OBJECTIVES:
            register_objective(loss, Objective(loss, loss, mixes=True))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    results: dict[str, dict[str, dict[str, float]]] = {}
    first: dict[str, SmoothnessTrace] = {}
    for loss in losses:
        traces = []
        for seed in seeds:
            traces.append(trace(arguments.data, loss, seed, arguments.runs))
            print(f"{loss}, seed {seed}: {traces[-1].summary()}", file=sys.stderr, flush=True)
        results[loss] = {at: row(traces, at) for at in ("scheduled", "target")}
        first[loss] = traces[0]
    for at in ("scheduled", "target"):
        print(f"\n{table(results, at)}")
        save(plot_smoothness(first, at), arguments.pictures / f"smoothness_{name}_{at}.png")
    out = ROOT / "benchmarks" / f"landscape_{name}.json"
    versions = {"lirpa_ext": lirpa_ext.__version__, "auto_LiRPA": engine_version()}
    document = {"data": name, "seeds": seeds, "versions": versions, "medians_of_the_ramp": results}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
