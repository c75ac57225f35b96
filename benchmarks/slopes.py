"""Cost of certified training steps with IBP, CROWN-IBP and one-step slopes, as ratios to a plain training step.

One thread, CPU time, the variants interleaved, medians, forward and backward. Prints a table and writes JSON.

    python benchmarks/slopes.py [--repeats 7] [--batch 128] [--out benchmarks/slopes.json]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import arguments, conv_net, interval_loss, medians, peaks_mib, show, write

from lirpa_ext import BoundedModule, fused_cross_entropy, worst_case_logits

# C.1 of the source: Conv(c, k, s) with padding 1, and the l-inf radius of the steps. Small* is the net that the
# official code has for MNIST.
NETWORKS = {
    "MNIST Small": (lambda: conv_net(1, 28, [(16, 4, 2, 1), (32, 4, 1, 1)], [100]), (1, 28, 28), 0.1),
    "MNIST Small*": (lambda: conv_net(1, 28, [(16, 4, 2, 1), (32, 4, 2, 1)], [100]), (1, 28, 28), 0.1),
    "CIFAR Medium": (
        lambda: conv_net(3, 32, [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512, 512]),
        (3, 32, 32),
        2 / 255,
    ),
}

MEASURED = ("IBP", "CROWN-IBP", "one-step", "CROWN-IBP fused", "one-step fused")


def steps(name: str, batch: int) -> dict[str, Callable[[], None]]:
    """The training steps to compare, on one network."""
    torch.manual_seed(0)
    build, shape, eps = NETWORKS[name]
    model = build()
    x, y = torch.rand(batch, *shape), torch.randint(10, (batch,))
    bounded = BoundedModule(model, x)
    unread = torch.zeros(batch, 10)  # clean logits, which only shift the worst ones: none of these needs them

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def by_hand() -> None:
        model.zero_grad()
        interval_loss(model, x, y, eps).backward()

    def dense(method: str) -> None:
        model.zero_grad()
        F.cross_entropy(worst_case_logits(bounded, x, y, eps, method, math.inf, logits=unread), y).backward()

    def fused(method: str) -> None:
        model.zero_grad()
        fused_cross_entropy(bounded, x, y, eps, method, math.inf).mean().backward()

    return {
        "plain": plain,
        "IBP by hand": by_hand,
        "IBP": lambda: dense("slope:ibp"),
        "IBP of the engine": lambda: dense("IBP"),
        "CROWN-IBP": lambda: dense("slope:crown"),
        "one-step": lambda: dense("sparse-slope"),
        "CROWN-IBP fused": lambda: fused("slope:crown"),
        "one-step fused": lambda: fused("sparse-slope"),
    }


def main() -> None:
    options = arguments(__doc__, Path(__file__).with_suffix(".json"), list(NETWORKS))
    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    for name in options.networks:
        seconds = medians(steps(name, options.batch), options.repeats)
        row = {"plain step, ms": 1e3 * seconds["plain"]}
        row |= {f"{step} / plain": value / seconds["plain"] for step, value in seconds.items() if step != "plain"}
        if options.memory:
            peaks = peaks_mib(steps, name, ("plain", *MEASURED), options.batch)
            row |= {f"{step}, peak MiB": peak for step, peak in peaks.items()}
        result[name] = show(name, options.batch, row)
    write(result, options.batch, options.out)


if __name__ == "__main__":
    main()
