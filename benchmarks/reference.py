"""Verified counts of every method on the reference network of the BCP paper's code, and seconds.

The network and the first 200 MNIST test images lie beside the repository, in ``../shared``. Float64, one thread.
Prints a table and writes JSON with the verdict of every image; exits with 1 if a verified image is attacked.

    python benchmarks/reference.py [--images 200] [--eps 0.5 1.0 1.58] [--out benchmarks/reference.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.attacks import PGD
from lirpa_ext.data import load_data
from lirpa_ext.domain.specifications import margin_rows, margins
from lirpa_ext.engine import engine_version

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Row of the table: method and options, images a call (CROWN keeps a matrix for every neuron of every image).
METHODS: dict[str, tuple[str, dict[str, object], int]] = {
    "lipschitz": ("lipschitz", {}, 200),
    "bcp, as the source": ("bcp", {"tighten": False}, 200),
    "bcp": ("bcp", {}, 200),
    "CROWN (the engine's)": ("CROWN", {}, 10),
    "bcp-crown": ("bcp-crown", {}, 200),
    "bcp-alpha-crown": ("bcp-alpha-crown", {}, 200),
}


def load_network(folder: Path) -> nn.Sequential:
    """The MNIST network trained with the official code of BCP, in float64."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    with np.load(folder / "bcp_mnist_state_dict.npz") as state:
        net.load_state_dict({name: torch.from_numpy(state[name]) for name in state})
    return net.double().eval()


def verified(
    bounded: BoundedModule, x: Tensor, y: Tensor, eps: float, row: str, limit: float = float("inf")
) -> tuple[Tensor, float]:
    """Which images a method verifies, and the seconds taken; images beyond the time limit count as not verified."""
    method, options, chunk = METHODS[row]
    flags = torch.zeros(len(x), dtype=torch.bool)
    start = time.perf_counter()
    for index in torch.arange(len(x)).split(chunk):
        if time.perf_counter() - start > limit:
            print(f"{row} at eps {eps} stopped after {int(index[0])} images ({limit:.0f} s)", file=sys.stderr)
            break
        rows = margin_rows(y[index], 10, x.dtype)
        ball = BoundedTensor(x[index], PerturbationLpNorm(eps, norm=2))
        lower, _ = bounded.compute_bounds(x=(ball,), C=rows, method=method, bound_upper=False, **options)
        flags[index] = (lower > 0).all(1)
    return flags, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--eps", type=float, nargs="*", default=[0.5, 1.0, 1.58])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a method may take at one eps")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = load_network(options.shared / "peers")
    x, y = (part[: options.images] for part in load_data(str(options.shared / "data" / "mnist")))
    x = x.double()
    graphs = {row: BoundedModule(net, x[: METHODS[row][2]]) for row in options.methods}
    with torch.no_grad():
        clean = margins(net(x), y) > 0
    print(f"{len(x)} images, clean {int(clean.sum())}")
    print(f"{'':<22}" + "".join(f"{f'eps {eps}':>24}" for eps in options.eps))
    lines: dict[str, list[str]] = {row: [] for row in ("PGD", *options.methods)}
    results: dict[str, dict[str, dict[str, object]]] = {row: {} for row in lines}
    broken = 0
    for eps in options.eps:
        start = time.perf_counter()
        robust = PGD(steps=100, restarts=3)(net, x, y, PerturbationLpNorm(eps, norm=2)).margins > 0
        outcome = {"PGD": (robust, time.perf_counter() - start)}
        with torch.no_grad():
            for row, graph in graphs.items():
                outcome[row] = verified(graph, x, y, eps, row, options.limit)
        for row, (flags, seconds) in outcome.items():
            wrong = int((flags & ~robust).sum())
            broken += wrong
            lines[row].append(f"{int(flags.sum()):>6} {seconds:>7.1f} s {f'{wrong} broken' if wrong else '':>7}")
            results[row][str(eps)] = {"images": flags.nonzero().flatten().tolist(), "seconds": round(seconds, 2)}
    for row, cells in lines.items():
        print(f"{row:<22}" + "".join(f"{cell:>24}" for cell in cells))
    versions = {"lirpa_ext": lirpa_ext.__version__, "auto_LiRPA": engine_version(), "torch": torch.__version__}
    document = {"images": len(x), "clean": int(clean.sum()), "broken": broken, "versions": versions, "results": results}
    options.out.write_text(json.dumps(document) + "\n")
    print(f"{broken} verified images broken by PGD; written to {options.out}")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
