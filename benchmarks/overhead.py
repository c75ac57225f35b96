"""What saving, locking and checking cost, as a share of a training and of a certification, in CPU and wall time.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--network 4C3F] [--out benchmarks/overhead.json]

The first is a run of `lirpa-ext fit` with the BCP loss on random images, which saves every 100 steps; the second
certifies 100 of its images by BCP, with the default attack, into a results file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# isort: split
import torch
from lightning.pytorch import LightningDataModule, Trainer

from lirpa_ext import certify
from lirpa_ext.training import keep_freed_memory
from lirpa_ext.training.batches import Batches, Parts
from lirpa_ext.training.runs import fit, parse

SAVING = [
    (Trainer, "save_checkpoint"), ("lirpa_ext.training.module.CertifiedClassifier", "_check_loss"),
    ("lirpa_ext.training.runs", "_state"),
    ("lirpa_ext.reporting.files", "acquire"), ("lirpa_ext.reporting.files", "release"),
]  # fmt: skip
PLACE = "lirpa_ext.certification"
KNOWING = [
    (f"{PLACE}.certify", "model_hash"), (f"{PLACE}.certify", "outputs"), (f"{PLACE}.certify", "hash_tensors"),
    (f"{PLACE}.certifier", "check_deterministic"), (f"{PLACE}.results_file.ResultsFile", "__init__"),
    (f"{PLACE}.results_file.ResultsFile", "append"), (f"{PLACE}.results_file.ResultsFile", "close"),
]  # fmt: skip


class RandomImages(LightningDataModule):
    """Images and labels drawn at random.

    Args:
        batches: Training batches of 50 an epoch.
    """

    def __init__(self, batches: int = 200) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(50 * batches, 1, 28, 28, generator=generator)
        self.y = torch.randint(10, (50 * batches,), generator=generator)

    def train_dataloader(self) -> Batches:
        return Batches(self.x, self.y, 50)

    def val_dataloader(self) -> Parts:
        return Parts(self.x[:100], self.y[:100], 100)


@contextlib.contextmanager
def timed(places: list[tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """CPU and wall seconds within these functions, by name, and of the whole block by ""."""
    spent: dict[str, list[float]] = {name: [0.0, 0.0] for _, name in places} | {"": [0.0, 0.0]}

    def note(name: str, start: tuple[float, float]) -> None:
        for k, clock in enumerate((time.process_time, time.perf_counter)):
            spent[name][k] += clock() - start[k]

    def wrapped(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time(), time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                note(name, start)

        return call

    with contextlib.ExitStack() as stack:
        for place, name in places:
            target = place if not isinstance(place, str) else _found(place)
            stack.enter_context(mock.patch.object(target, name, wrapped(name, getattr(target, name))))
        start = time.process_time(), time.perf_counter()
        yield spent
        note("", start)


def _found(path: str) -> Any:
    """A module, or a class of one: `lirpa_ext.certify` is also the function's name."""
    if path not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(path)
    module, _, name = path.rpartition(".")
    return sys.modules[path] if path in sys.modules else getattr(importlib.import_module(module), name)


def shares(spent: dict[str, list[float]]) -> dict[str, Any]:
    """Percent of the whole, in CPU and in wall time, and the CPU milliseconds of each part."""
    whole = spent.pop("")
    cpu, wall = (100 * sum(part[k] for part in spent.values()) / whole[k] for k in (0, 1))
    parts = {name.strip("_"): round(1000 * part[0], 1) for name, part in spent.items()}
    return {
        "cpu_percent": round(cpu, 2),
        "wall_percent": round(wall, 2),
        "cpu_s": round(whole[0], 1),
        "parts_ms": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="4C3F")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config = parse([
            "--model.network.name", arguments.network, "--model.network.input_shape", "[1, 28, 28]",
            "--model.loss.name", "bcp", "--model.eps", "1.58", "--data.class_path", "overhead.RandomImages",
            "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
            "--model.evaluation.attack_steps", "0", "--checkpoint_every", "100", "--run", f"{folder}/run",
            "--progress", "false",
        ])  # fmt: skip
        with timed(SAVING) as spent:
            module = fit(config)
        found = {"network": arguments.network, "training": shares(spent)}
        data = RandomImages(2)
        model = module.model.eval()
        with timed(KNOWING) as spent:
            certify(model, (data.x, data.y), [0.5], method="bcp", x_L=0.0, x_U=1.0, results=f"{folder}/found.jsonl",
                    progress=False)  # fmt: skip
        found["certification"] = shares(spent)
    print(json.dumps(found, indent=1))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
