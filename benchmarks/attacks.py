"""How strong the default attack is: robust accuracy under it and under those of torchattacks, foolbox and AutoAttack.

Trains three small networks (digits; MNIST; MNIST on the points of an attack) and attacks the same test images in the
same balls, each attack with as many gradients. Fewer robust images: a stronger attack. Prints a table, writes JSON.

    pip install --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy   # the package itself needs none of them
    python benchmarks/attacks.py --mnist FOLDER [--images 250] [--steps 40] [--out benchmarks/attacks.json]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from harness import conv_net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lirpa_ext import PerturbationLpNorm
from lirpa_ext.attacks import APGD, PGD
from lirpa_ext.data import load_data, load_digits

INF = math.inf
# network: norm and eps of the balls
BALLS = {
    "digits": [(INF, 0.05), (INF, 0.1), (2, 0.5), (2, 1.0)],
    "MNIST": [(INF, 0.05), (INF, 0.1), (2, 1.0), (2, 1.5)],
    "MNIST, adversarial": [(INF, 0.2), (INF, 0.25), (2, 1.5), (2, 2.0)],
}


def trained(net: nn.Module, x: Tensor, y: Tensor, epochs: int, eps: float = 0.0) -> nn.Module:
    """The network after Adam on batches of 128, with eps on the points of PGD-5 in l-infinity balls."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for some in torch.randperm(len(x), generator=generator).split(128):
            images = x[some]
            if eps:
                ball = PerturbationLpNorm(eps * min(1, (epoch + 1) / 2), INF, 0.0, 1.0)
                images = PGD(5, loss="cross-entropy")(net, images, y[some], ball, generator).inputs
            optimizer.zero_grad()
            cross_entropy(net(images), y[some]).backward()
            optimizer.step()
    return net.eval()


def networks(mnist: str) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Each network, and its test images and labels."""
    torch.manual_seed(0)
    x, y = load_digits("train")
    dense = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    found = {"digits": (trained(nn.Sequential(nn.Flatten(), *dense), x, y, 30), *load_digits("test"))}
    x, y = load_data(mnist, "train", 20000)
    test = load_data(mnist, "test", 1000)
    for name, epochs, eps in (("MNIST", 3, 0.0), ("MNIST, adversarial", 4, 0.2)):
        torch.manual_seed(0)
        net = conv_net(1, 28, [(8, 4, 2, 1), (16, 4, 2, 1)], [64])
        found[name] = (trained(net, x, y, epochs, eps), *test)
    return found


def attacks(steps: int) -> dict[str, Callable[[nn.Module, Tensor, Tensor, float, float], Tensor]]:
    """Functions (network, x, y, norm, eps) -> adversarial points, each with `steps` gradients."""

    def ours(attack: APGD | PGD) -> Callable[..., Tensor]:
        return lambda net, x, y, norm, eps: attack(net, x, y, PerturbationLpNorm(eps, norm, 0.0, 1.0)).inputs

    def torchattacks_pgd(net: nn.Module, x: Tensor, y: Tensor, norm: float, eps: float) -> Tensor:
        import torchattacks

        kind = torchattacks.PGD if norm == INF else torchattacks.PGDL2
        return kind(net, eps=eps, alpha=2.5 * eps / steps, steps=steps)(x, y)

    def foolbox_pgd(net: nn.Module, x: Tensor, y: Tensor, norm: float, eps: float) -> Tensor:
        git = sys.modules.setdefault("git", types.ModuleType("git"))  # which only its model zoo needs
        git.Repo = None  # type: ignore[attr-defined]
        import foolbox

        kind = foolbox.attacks.LinfPGD if norm == INF else foolbox.attacks.L2PGD
        attack = kind(steps=steps, rel_stepsize=2.5 / steps)
        return attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=eps)[1]

    def auto_pgd(loss: str) -> Callable[..., Tensor]:
        def run(net: nn.Module, x: Tensor, y: Tensor, norm: float, eps: float) -> Tensor:
            from pyautoattack.autopgd_base import APGDAttack

            kind = "Linf" if norm == INF else "L2"
            return APGDAttack(
                net, n_iter=steps, norm=kind, n_restarts=1, eps=eps, seed=0, loss=loss, device="cpu"
            ).perturb(x, y)

        return run

    return {
        "default": ours(APGD(steps // 2, restarts=2)),
        "APGD": ours(APGD(steps)),
        "PGD": ours(PGD(steps)),
        "torchattacks PGD": torchattacks_pgd,
        "foolbox PGD": foolbox_pgd,
        "AutoAttack APGD-CE": auto_pgd("ce"),
        "AutoAttack APGD-DLR": auto_pgd("dlr"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder with MNIST's files")
    parser.add_argument("--images", type=int, default=250, help="of each test set")
    parser.add_argument("--steps", type=int, default=40, help="gradients of each attack and image")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| network | norm | eps |", " | ".join(attacks(arguments.steps)), "|")
    for name, (net, x, y) in networks(arguments.mnist).items():
        x, y = x[: arguments.images], y[: arguments.images]
        for norm, eps in BALLS[name]:
            row: dict[str, object] = {"network": name, "norm": str(norm), "eps": eps}
            for attack, function in attacks(arguments.steps).items():
                torch.manual_seed(0)
                points = function(net, x, y, norm, eps).detach()
                with torch.no_grad():
                    row[attack] = round(100 * float((net(points).argmax(1) == y).double().mean()), 1)
            rows.append(row)
            print("|", " | ".join(map(str, row.values())), "|", flush=True)
    content = {"images": arguments.images, "steps": arguments.steps, "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(content | {"machine": platform.machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
