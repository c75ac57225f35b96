"""What the trainer costs over the bare loss step: milliseconds of CPU a step, interleaved, medians.

OMP_NUM_THREADS=1 python benchmarks/trainer.py
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import lirpa_ext  # before Lightning: it mends a torchvision that does not fit the torch that is there

# isort: split
import torch
from lightning.pytorch import Callback, Trainer

from lirpa_ext.training import CertifiedClassifier, Loss, Network, Schedule, keep_freed_memory
from lirpa_ext.training.batches import Batches
from lirpa_ext.training.objectives import Step, step_loss
from lirpa_ext.training.schedules import Values

SOURCE = {"tighten": False}  # the bound of the source
CASES = [
    ("2C2F", Loss("natural"), 2.0, 50), ("2C2F", Loss("bcp"), 2.0, 50), ("2C2F", Loss("bcp", SOURCE), 2.0, 50),
    ("4C3F", Loss("natural"), 2.0, 50), ("4C3F", Loss("bcp"), 2.0, 50), ("4C3F", Loss("bcp", SOURCE), 2.0, 50),
    ("Small", Loss("natural"), float("inf"), 128), ("Small", Loss("ibp"), float("inf"), 128),
]  # fmt: skip


class Clock(Callback):
    """CPU seconds from the start of one training batch to that of the next: fetching, hooks, logging, optimizer."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time."""
        self.marks.append(time.process_time())


def by_trainer(network: str, loss: Loss, norm: float, batches: Batches) -> list[float]:
    """Milliseconds of each step of an epoch."""
    module = _module(network, loss, norm)
    clock = Clock()
    trainer = Trainer(
        max_epochs=1, callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=batches)
    return [1000 * (b - a) for a, b in zip(clock.marks, clock.marks[1:], strict=False)][3:]


def bare(network: str, loss: Loss, norm: float, batches: Batches) -> list[float]:
    """The same steps by a loop written by hand."""
    module = _module(network, loss, norm)
    model, optimizer = module.model, torch.optim.Adam(module.model.parameters(), 1e-3)
    bounded, times = None, []
    mark = time.process_time()
    for x, y in batches:
        if bounded is None:
            bounded = lirpa_ext.BoundedModule(model, x)
        value = step_loss(loss, Step(bounded, x, y, None, Values(0.1, 0.5, 1.0), norm, 0.0, 1.0))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        times.append(1000 * (time.process_time() - mark))
        mark = time.process_time()
    return times[3:]


def _module(network: str, loss: Loss, norm: float) -> CertifiedClassifier:
    torch.manual_seed(0)
    schedule = Schedule(kappa=[0.5, 0.5])
    return CertifiedClassifier(Network(network, [1, 28, 28]), loss, 0.1, norm, schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `lirpa-ext fit` does
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    results = []
    for network, loss, norm, size in CASES:
        x, y = torch.rand(arguments.steps * size, 1, 28, 28), torch.randint(10, (arguments.steps * size,))
        times: dict[str, list[float]] = {"trainer": [], "bare": []}
        for _ in range(arguments.rounds):
            times["bare"] += bare(network, loss, norm, Batches(x, y, size))
            times["trainer"] += by_trainer(network, loss, norm, Batches(x, y, size))
        row = {"network": network, "loss": loss.name, "options": loss.options, "batch": size}
        row |= {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}
        row["overhead_percent"] = round(100 * (row["trainer_ms"] / row["bare_ms"] - 1), 1)
        results.append(row)
        plain = next(r for r in results if r["network"] == network and r["loss"] == "natural")
        row["ratio_to_plain"] = round(row["trainer_ms"] / plain["trainer_ms"], 1)
        print(row)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
