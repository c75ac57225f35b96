"""Cost of a BCP training step, of certification and of norm bounds, as ratios to the plain network.

One thread, CPU time, the variants interleaved, medians. Prints a table and writes JSON.

    python benchmarks/bcp.py [--repeats 7] [--batch 128] [--out benchmarks/bcp.json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import arguments, conv_net, interval_loss, medians, peaks_mib, show, write

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.domain.specifications import margin_rows

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


def norm_seconds(name: str) -> float:
    """CPU seconds of all norm bounds of a network, from nothing."""
    from lirpa_ext.domain.norms import spectral_norm_bound
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


def main() -> None:
    options = arguments(__doc__, Path(__file__).with_suffix(".json"), list(NETWORKS))
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
            peaks = peaks_mib(steps, name, ("plain", "bcp", "bcp tighten"), options.batch)
            row["plain step, peak MiB"], row["BCP peak / plain"] = peaks["plain"], peaks["bcp"] / peaks["plain"]
            row["BCP tighten peak / plain"] = peaks["bcp tighten"] / peaks["plain"]
        result[name] = show(name, options.batch, row)
    write(result, options.batch, options.out)


if __name__ == "__main__":
    main()
