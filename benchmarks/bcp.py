"""Cost of a BCP training step, of certification and of norm bounds, as ratios to the plain network.

One thread, CPU time, the variants interleaved, medians. Prints a table and writes JSON.

    python benchmarks/bcp.py [--repeats 7] [--batch 128] [--out benchmarks/bcp.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.engine import engine_version
from lirpa_ext.specifications import margin_rows


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


NETWORKS = {
    "MNIST 4C3F": (
        lambda: conv_net(1, 28, [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512, 512]),
        (1, 28, 28),
    ),
    "CIFAR 6C2F": (
        lambda: conv_net(
            3, 32, [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512]
        ),
        (3, 32, 32),
    ),
}


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


def steps(name: str, batch: int) -> dict[str, Callable[[], None]]:
    """The training steps to compare, on one network: clean forward-backward, IBP, BCP."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build()
    x, y = torch.rand(batch, *shape), torch.randint(10, (batch,))
    bounded = BoundedModule(model, x)
    C = margin_rows(y, 10, torch.float32)

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()

    def interval() -> None:
        interval_loss(model, x, y, 0.01).backward()

    def bcp(tighten: bool) -> None:
        ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.5))
        margins, _ = bounded.compute_bounds(
            x=(ball,), C=C, method="bcp", bound_upper=False, norms="estimate", tighten=tighten, max_steps=10
        )
        F.cross_entropy(F.pad(-margins, (1, 0)), torch.zeros_like(y)).backward()

    return {"plain": plain, "ibp": interval, "bcp": lambda: bcp(False), "bcp tighten": lambda: bcp(True)}


def certification(name: str, batch: int) -> dict[str, Callable[[], None]]:
    """Plain forward against certification with cached norms, without gradients."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().eval()
    x, y = torch.rand(batch, *shape), torch.randint(10, (batch,))
    bounded = BoundedModule(model, x)
    C = margin_rows(y, 10, torch.float32)

    def plain() -> None:
        with torch.no_grad():
            model(x)

    def certify(method: str) -> None:
        with torch.no_grad():
            ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.5))
            bounded.compute_bounds(x=(ball,), C=C, method=method, bound_upper=False)

    return {"forward": plain, "lipschitz": lambda: certify("lipschitz"), "bcp": lambda: certify("bcp")}


def medians(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function, called in turn; one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def norm_seconds(name: str) -> float:
    """CPU seconds of all norm bounds of a network, from nothing."""
    from lirpa_ext.norms import spectral_norm_bound
    from lirpa_ext.rules.linear import power_iterable

    build, shape = NETWORKS[name]
    bounded = BoundedModule(build(), torch.rand(2, *shape))
    start = time.process_time()
    with torch.no_grad():
        for node in list(bounded._modules.values()):
            found = power_iterable(node) if len(node.inputs) > 1 else None
            if found is not None:
                spectral_norm_bound(found[2](found[1].live))
    return time.process_time() - start


def peak_mib(arguments: tuple[str, str, int]) -> float:
    """Largest resident MiB during a step in a fresh process, less what it had before; polled each millisecond."""
    name, step, batch = arguments
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    for name in options.networks:
        step = medians(steps(name, options.batch), options.repeats)
        certify = medians(certification(name, options.batch), options.repeats)
        row = {"plain step, ms": 1e3 * step["plain"], "IBP by hand / plain": step["ibp"] / step["plain"]}
        row["BCP / plain"] = step["bcp"] / step["plain"]
        row["BCP tighten / plain"] = step["bcp tighten"] / step["plain"]
        row["BCP / IBP by hand"] = step["bcp"] / step["ibp"]
        row["forward, images/s"] = options.batch / certify["forward"]
        row["BCP certification / forward"] = certify["bcp"] / certify["forward"]
        row["lipschitz certification / forward"] = certify["lipschitz"] / certify["forward"]
        row["norm bounds, s"] = norm_seconds(name)
        if options.memory:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peaks = pool.map(peak_mib, [(name, s, options.batch) for s in ("plain", "bcp", "bcp tighten")], 1)
            row["plain step, peak MiB"], row["BCP peak / plain"] = peaks[0], peaks[1] / peaks[0]
            row["BCP tighten peak / plain"] = peaks[2] / peaks[0]
        result[name] = {key: round(value, 3) for key, value in row.items()}
        print(f"\n{name}, batch {options.batch}")
        for key, value in row.items():
            print(f"  {key:<36}{value:>10.2f}")
    versions = {"lirpa_ext": lirpa_ext.__version__, "auto_LiRPA": engine_version(), "torch": torch.__version__}
    document = {"batch": options.batch, "versions": versions, "machine": platform.machine(), "results": result}
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
