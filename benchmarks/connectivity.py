"""Are models of different losses connected? The pairs of Fig. C.3 to C.5 of the source, on scikit-learn's digits.

OMP_NUM_THREADS=1 python benchmarks/landscape.py --seeds 0,1 --losses "ibp crown-ibp sparse-slope"   # trains them
OMP_NUM_THREADS=1 python benchmarks/connectivity.py

Each pair has a curve for each of its two losses, trained and evaluated on the same 1,200 training images. The models of
a pair are of different seeds: from the same weights and batches, they would have come out close to each other.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from lirpa_ext.analysis import CertifiedObjective, connect, plot_connectivity
from lirpa_ext.data import load_data
from lirpa_ext.engine import engine_version
from lirpa_ext.models.loading import load_model
from lirpa_ext.reporting.plots import save
from lirpa_ext.training import Loss

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (("crown-ibp", "ibp"), ("ibp", "sparse-slope"), ("crown-ibp", "sparse-slope"))
EPS = 0.1


def main() -> None:
    """Print, draw and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "landscape")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the curves and the first model; the second has the next"
    )
    arguments = parser.parse_args()
    data = load_data("digits", "train", 1200)
    rows, shown = [], []
    for ends in PAIRS:
        first, second = (
            load_model(arguments.runs / f"digits_{name}_{arguments.seed + number}" / "model.pt")
            for number, name in enumerate(ends)
        )
        for name in ends:
            objective = CertifiedObjective(Loss(name), EPS, math.inf, 0.0, 1.0)
            found = connect(
                first, second, objective, data, steps=400, name=f"{name} loss", ends=ends, seed=arguments.seed
            )
            print(found.summary(), flush=True)
            rows.append(
                {"first": ends[0], "second": ends[1], "loss": name, "connected": found.connected}
                | {"barrier": round(found.barrier, 4), "line_barrier": round(found.line_barrier, 4)}
                | {
                    "at_ends": [round(found.curve[0], 4), round(found.curve[-1], 4)],
                    "highest": round(max(found.curve), 4),
                }
            )
            if ends == PAIRS[0]:
                shown.append(found)
    drawn = plot_connectivity(shown)
    drawn.axes[0].set_yscale("log")
    save(drawn, arguments.pictures / "connectivity_digits.png")
    document = {"engine": engine_version(), "eps": EPS, "seed": arguments.seed, "curves": rows}
    out = ROOT / "benchmarks" / "connectivity.json"
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
