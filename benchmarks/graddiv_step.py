"""What GradDiv costs: CPU time of a training step of Adv-BNN with it and without, as a ratio.

    python benchmarks/graddiv_step.py [--repeats 7] [--batch 64]

One thread, steps interleaved, medians. A step is the source's: PGD of 10 steps on the randomized network, the
adversarial evidence lower bound at its end, and (2.2.16) of n = 3 gradients; forward and backward, no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from harness import arguments, medians, peaks_mib, show, write

from lirpa_ext.domain.perturbation import PerturbationLpNorm
from lirpa_ext.training import Loss, Network, build
from lirpa_ext.training.randomized import randomized_loss
from lirpa_ext.training.schedules import Values

OUT = Path(__file__).with_suffix(".json")
NETWORKS = {"2C2F": [1, 28, 28], "3C2F": [1, 28, 28]}


def steps(name: str, batch: int) -> dict[str, Callable[[], None]]:
    """A step of each kind."""
    torch.manual_seed(0)
    model = build(Network(name, NETWORKS[name], randomized="adv-bnn", options={"prior_std": 0.05}))
    x, y = torch.rand(batch, *NETWORKS[name]), torch.arange(batch) % 10
    ball = PerturbationLpNorm(0.3, math.inf, 0.0, 1.0)

    def step(regularizer: str | None) -> Callable[[], None]:
        loss = Loss("adv-bnn", attack_steps=10, graddiv=regularizer)
        values = Values(0.3, 0.0, 1.0, 0.0 if regularizer is None else 1.0)

        def take() -> None:
            model.zero_grad()
            randomized_loss(loss, model, x, y, ball, values, 10000).backward()

        return take

    return {"adv-bnn": step(None), **{f"graddiv-{name}": step(name) for name in ("kappa", "mean", "dpp")}}


def main() -> None:
    """Time, print and write."""
    chosen = arguments(__doc__, OUT, list(NETWORKS))
    torch.set_num_threads(1)
    result = {}
    for name in chosen.networks:
        times = medians(steps(name, chosen.batch), chosen.repeats)
        row = {"adv-bnn step, ms": 1000 * times["adv-bnn"]}
        row |= {f"{key} / adv-bnn": value / times["adv-bnn"] for key, value in times.items() if key != "adv-bnn"}
        if chosen.memory:
            peaks = peaks_mib(steps, name, ["adv-bnn", "graddiv-kappa"], chosen.batch)
            row |= {f"{key}, peak MiB": value for key, value in peaks.items()}
        result[name] = show(name, chosen.batch, row)
    write(result, chosen.batch, chosen.out)


if __name__ == "__main__":
    main()
