"""What one measurement of `lirpa_ext.analysis.Smoothness` costs, in steps of training: CPU time, interleaved, medians.

OMP_NUM_THREADS=1 python benchmarks/smoothness_cost.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from harness import medians  # which imports lirpa_ext, before Lightning

# isort: split
import torch

from lirpa_ext.analysis.landscape import smoothness
from lirpa_ext.engine import engine_version
from lirpa_ext.training import CertifiedClassifier, Loss, Network
from lirpa_ext.training.schedules import Values

CASES = {"digits, batch 64": ([1, 8, 8], 64), "MNIST, batch 50": ([1, 28, 28], 50)}
LOSSES = (("ibp", math.inf), ("crown-ibp", math.inf), ("sparse-slope", math.inf), ("bcp", 2.0))


def functions(shape: list[int], batch: int, loss: str, norm: float) -> dict[str, Callable[[], None]]:
    """A step of training, and a measurement at one eps."""
    torch.manual_seed(0)
    module = CertifiedClassifier(Network("2C2F", shape), Loss(loss), 0.1, norm)
    x, y = torch.rand(batch, *shape), torch.arange(batch) % 10
    values, weights = Values(0.05, 0.0, 1.0), list(module.model.parameters())
    optimizer = torch.optim.Adam(weights, 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        module.batch_loss(x, y, values).backward()
        optimizer.step()

    return {
        "step": step,
        "measure": lambda: smoothness(lambda: module.batch_loss(x, y, values), weights, 1e-3) and None,
    }


def main() -> None:
    """Print and write the ratios."""
    results = {}
    for case, (shape, batch) in CASES.items():
        for loss, norm in LOSSES:
            times = medians(functions(shape, batch, loss, norm), 9)
            results[f"{case}, {loss}"] = round(times["measure"] / times["step"], 2)
            print(f"{case}, {loss}: {results[f'{case}, {loss}']} steps of {1000 * times['step']:.1f} ms")
    out = Path(__file__).with_suffix(".json")
    document = {"engine": engine_version(), "torch": torch.__version__, "steps_of_one_measurement": results}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
