"""GradDiv on scikit-learn's digits: Adv-BNN with and without it, and how alike the gradients of their draws are.

    python examples/adv_bnn_graddiv.py

S. Lee's dissertation (2021), chapter 2. rho, the mean resultant length of the loss gradients of drawn networks, falls
by a third or more. Of this small dense network the accuracy under EOT-PGD does not rise with it: more diverse gradients
are worth less to the attacker, and training for them costs margin. Takes half a minute on one CPU core.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lirpa_ext import PerturbationLpNorm
from lirpa_ext.attacks import EOT, PGD
from lirpa_ext.certification import evaluate
from lirpa_ext.data import load_digits
from lirpa_ext.randomized import elbo_loss, gradients, make_adv_bnn, mean_resultant_length
from lirpa_ext.randomized.graddiv import kappa

EPS, EPOCHS, BATCH = 0.2, 25, 100


def train(weight: float) -> nn.Module:
    """Adv-BNN of 64-100-10 units; eps and the weight of GradDiv rise over the first half of the training."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.LeakyReLU(), nn.Linear(100, 10))
    model = make_adv_bnn(net, prior_std=0.15)
    attack = EOT(PGD(5, step_size=0.25, loss="cross-entropy", random_start=False), draws=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = load_digits("train")
    for epoch in range(EPOCHS):
        share = min(1.0, 2 * epoch / EPOCHS)
        ball = PerturbationLpNorm(share * EPS, math.inf, 0.0, 1.0)
        for index in torch.randperm(len(x)).split(BATCH):
            images, labels = x[index], y[index]
            attacked = attack(model, images, labels, ball, generator).inputs
            loss = elbo_loss(model, model(attacked), labels, samples=len(x))
            if share * weight > 0:
                found = gradients(model, images, labels, 3, generator)
                loss = loss + share * weight * kappa(found).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train both, and print a table."""
    x, y = load_digits("test")
    x, y = x[:200], y[:200]
    print(f"{'network':<20} {'rho':>6} {'clean %':>8} {f'EOT-PGD {EPS} %':>15} {f'EOT-PGD {1.5 * EPS:.1f} %':>15}")
    for name, weight in (("Adv-BNN", 0.0), ("Adv-BNN + GradDiv", 0.3)):
        model = train(weight)
        found = gradients(model, x, y, 20, torch.Generator().manual_seed(1), create_graph=False)
        levels = evaluate(model, (x, y), [0.0, EPS, 1.5 * EPS]).levels
        clean, near, far = (100 * level.ensemble.value for level in levels)
        print(f"{name:<20} {mean_resultant_length(found).mean():>6.3f} {clean:>8.1f} {near:>15.1f} {far:>15.1f}")


if __name__ == "__main__":
    main()
