"""What the benchmarks share: networks, interleaved CPU times, peak memory, table and JSON."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lirpa_ext
from lirpa_ext.engine import engine_version
from lirpa_ext.training import keep_freed_memory

Steps = Callable[[str, int], dict[str, Callable[[], None]]]  # (network, batch) -> what is timed


def conv_net(channels: int, size: int, layers: list[tuple[int, int, int, int]], hidden: list[int]) -> nn.Sequential:
    """Convolutions (channels, kernel, stride, padding) with ReLUs, then dense layers; ten classes (B.3.3)."""
    modules: list[nn.Module] = []
    for out, kernel, stride, padding in layers:
        modules += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
        channels, size = out, (size + 2 * padding - kernel) // stride + 1
    modules.append(nn.Flatten())
    width = channels * size * size
    for units in hidden:
        modules += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*modules, nn.Linear(width, 10))


def interval_loss(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Interval bound propagation written by hand (Gowal et al. 2018), cross entropy of the worst logits."""
    center, radius = x, torch.full_like(x, eps)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.stride, layer.padding)
            center = F.conv2d(center, layer.weight, layer.bias, *geometry)
            radius = F.conv2d(radius, layer.weight.abs(), None, *geometry)
        elif isinstance(layer, nn.Linear):
            center, radius = layer(center), F.linear(radius, layer.weight.abs())
        elif isinstance(layer, nn.ReLU):
            lower, upper = (center - radius).relu(), (center + radius).relu()
            center, radius = (lower + upper) / 2, (upper - lower) / 2
        else:
            center, radius = layer(center), layer(radius)
    worst = torch.where(F.one_hot(y, 10).bool(), center - radius, center + radius)
    return F.cross_entropy(worst, y)


def medians(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function, called in turn with freed memory kept; one call each to warm up."""
    keep_freed_memory()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(arguments: tuple[Steps, str, str, int]) -> float:
    """Largest resident MiB during a step in a fresh process, less what it had before; polled each millisecond."""
    steps, name, step, batch = arguments
    torch.set_num_threads(1)
    function = steps(name, batch)[step]
    before = peak = resident_mib()
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_mib())

    thread = threading.Thread(target=poll)
    thread.start()
    function()
    done.set()
    thread.join()
    return peak - before


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peaks_mib(steps: Steps, name: str, which: Sequence[str], batch: int) -> dict[str, float]:
    """Peak memory of some steps on a network, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(which, pool.map(peak_mib, [(steps, name, step, batch) for step in which], 1), strict=True))


def arguments(description: str | None, out: Path, networks: list[str]) -> argparse.Namespace:
    """Command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", nargs="*", default=networks)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def show(name: str, batch: int, row: dict[str, float]) -> dict[str, float]:
    """Print the figures of a network; returns them rounded."""
    print(f"\n{name}, batch {batch}")
    for key, value in row.items():
        print(f"  {key:<36}{value:>10.2f}")
    return {key: round(value, 3) for key, value in row.items()}


def write(result: dict[str, dict[str, float]], batch: int, out: Path) -> None:
    """Write the figures, with the versions that they are of."""
    versions = {"lirpa_ext": lirpa_ext.__version__, "auto_LiRPA": engine_version(), "torch": torch.__version__}
    document = {"batch": batch, "versions": versions, "machine": platform.machine(), "results": result}
    out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nwritten to {out}")
