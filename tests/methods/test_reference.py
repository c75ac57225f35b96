"""The network trained with the official code of BCP: its values are ours, and ours certify no less.

Reference: the worst-translated logits that the official code of BCP (Lee, Lee and Park, NeurIPS 2020) gives for
the first 200 MNIST test images at l2 eps 1.0, converged and truncated, for BCP and for its LMT baseline.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, lipschitz, worst_case_logits
from lirpa_ext.attacks import PGD
from lirpa_ext.data import load_data
from lirpa_ext.domain.specifications import margin_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from reference import load_network, verified

# Norms of the layers before the last (PEERS.md).
EXACT_NORMS = {"0.weight": 0.4875182, "2.weight": 1.4841377, "5.weight": 3.0794317}
OFFICIAL = {"bcp": {"tighten": False}, "lipschitz": {}}
NAMES = {"bcp": "bcp", "lipschitz": "lmt"}


class Reference:
    """Network, images, labels and the official values."""

    def __init__(self, folder: Path) -> None:
        self.net = load_network(folder / "peers")
        with np.load(folder / "peers" / "bcp_mnist_reference.npz") as values:
            self.values = {name: torch.from_numpy(values[name]) for name in values}
        x, y = load_data(str(folder / "data" / "mnist"))
        self.x, self.y = x[:200].double(), y[:200]
        self.graph = BoundedModule(self.net, self.x)

    @torch.no_grad()
    def worst(self, method: str, eps: float = 1.0, **options: object) -> torch.Tensor:
        return worst_case_logits(self.graph, self.x, self.y, eps, method=method, **options)

    @torch.no_grad()
    def verified(self, method: str, eps: float, count: int = 200, **options: object) -> torch.Tensor:
        """Flags of the first images."""
        ball = BoundedTensor(self.x[:count], PerturbationLpNorm(eps, norm=2))
        rows = margin_rows(self.y[:count], 10)
        lower, _ = self.graph.compute_bounds(x=(ball,), C=rows, method=method, bound_upper=False, **options)
        return (lower > 0).all(1)


@pytest.fixture(scope="module")
def reference(shared):
    for part in ("peers/bcp_mnist_reference.npz", "peers/bcp_mnist_state_dict.npz", "data/mnist"):
        if not (shared / part).exists():
            pytest.skip(f"{shared / part} is not there")
    return Reference(shared)


def certified(worst, y):
    """Whether the label's logit is above all others' worst ones: a tie does not count."""
    own = worst.gather(1, y.unsqueeze(1))
    others = worst.scatter(1, y.unsqueeze(1), -torch.inf)
    return own.squeeze(1) > others.amax(1)


def relative(a, b):
    """Largest difference, relative to the largest logit of the sample."""
    return float(((a - b).abs().amax(1) / b.abs().amax(1)).max())


def test_it_is_the_same_network(reference):
    assert torch.equal(reference.y, reference.values["label"])
    clean = reference.net(reference.x)
    torch.testing.assert_close(clean.float(), reference.values["clean_logits"], rtol=1e-5, atol=2e-6)


def test_our_norm_bounds_are_the_exact_norms(reference):
    """From above, within 1e-6: so the package's own bounds stand for the exact norms in what follows."""
    report = lipschitz(reference.net, reference.x[:1], verbose=False)
    for layer in report.layers:
        if layer.name in EXACT_NORMS:
            exact = EXACT_NORMS[layer.name]
            assert exact - 5e-8 <= layer.bound <= exact + 2e-6, layer
            assert abs(layer.bound / exact - 1) <= 1.1e-6


@pytest.mark.parametrize("method", OFFICIAL)
def test_worst_logits_are_the_official_ones(reference, method):
    """Converged, in float64, on all 200 images: to 2e-5 relative, and the flags are equal."""
    worst = reference.worst(method, **OFFICIAL[method])
    official = reference.values[f"eps1.0_{NAMES[method]}_f64"]
    assert relative(worst, official) <= 2e-5
    torch.testing.assert_close(worst, official, rtol=2e-5, atol=2e-5)
    flags = certified(worst, reference.y)
    assert torch.equal(flags, certified(official, reference.y))
    assert torch.equal(flags, reference.values[f"eps1.0_{NAMES[method]}_certified"])
    assert int(flags.sum()) == {"bcp": 95, "lipschitz": 79}[method]
    assert relative(worst, reference.values[f"eps1.0_{NAMES[method]}"].double()) <= 2e-5  # and its float32


@pytest.mark.parametrize("method", OFFICIAL)
def test_float32_gives_the_official_values_too(reference, method):
    net, x = copy.deepcopy(reference.net).float(), reference.x.float()
    with torch.no_grad():
        worst = worst_case_logits(BoundedModule(net, x), x, reference.y, 1.0, method=method, **OFFICIAL[method])
    official = reference.values[f"eps1.0_{NAMES[method]}"]
    assert relative(worst, official) <= 2e-5
    assert torch.equal(certified(worst, reference.y), reference.values[f"eps1.0_{NAMES[method]}_certified"])


@pytest.mark.parametrize("steps", [1, 10])
def test_truncated_iterations_are_the_official_ones(reference, steps):
    """Algorithm 1 after opt_iter steps; one step is not converged, and differs."""
    official = reference.values[f"eps1.0_bcp_opt{steps}"].double()
    worst = reference.worst("bcp", tighten=False, solver="iterative", max_steps=steps)
    assert relative(worst, official) <= 2e-5
    if steps == 1:
        assert relative(reference.worst("bcp", tighten=False), official) > 1e-4


def test_defaults_certify_at_least_as_many(reference):
    """Our tightening loses nothing: image by image, and logit by logit. (On this network it gains nothing.)"""
    worst, default = reference.worst("bcp", tighten=False), reference.worst("bcp")
    assert (default <= worst + 1e-9).all()
    flags, more = certified(worst, reference.y), certified(default, reference.y)
    assert (more | ~flags).all()
    assert int(more.sum()) >= int(flags.sum()) == 95
    broken = PGD(steps=40)(reference.net, reference.x, reference.y, PerturbationLpNorm(1.0, 2)).margins <= 0
    assert not (more & broken).any()


@pytest.mark.parametrize("eps", [0.5, 1.0, 1.58])
def test_bcp_crown_verifies_what_bcp_does(reference, eps):
    flags, ours = reference.verified("bcp", eps), reference.verified("bcp-crown", eps)
    assert (ours | ~flags).all()
    assert int(ours.sum()) > 60
    broken = PGD(steps=40)(reference.net, reference.x, reference.y, PerturbationLpNorm(eps, 2)).margins <= 0
    assert not (ours & broken).any()


@pytest.mark.slow
def test_bcp_crown_verifies_what_the_engines_crown_does(reference):
    """The first 50 images at eps 0.5; all 200 at three eps are in benchmarks/reference.py."""
    x, y = reference.x[:50], reference.y[:50]
    with torch.no_grad():
        crown, _ = verified(BoundedModule(reference.net, x[:10]), x, y, 0.5, "CROWN (the engine's)")
    assert int(crown.sum()) > 20, "CROWN verifies nothing: the comparison is empty"
    assert (reference.verified("bcp-crown", 0.5, 50) | ~crown).all()


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.5, 1.0, 1.58])
def test_bcp_alpha_crown_verifies_more_than_the_official_bcp(reference, eps):
    """On 200 images, none of them broken by PGD, in 60 s on two cores (here: one thread, with slack)."""
    official = reference.verified("bcp", eps, tighten=False)
    start = time.process_time()
    ours = reference.verified("bcp-alpha-crown", eps)
    seconds = time.process_time() - start
    assert (ours | ~official).all()
    assert int(ours.sum()) > int(official.sum())
    attacked = PGD(steps=100, restarts=3)(reference.net, reference.x, reference.y, PerturbationLpNorm(eps, 2))
    assert not (ours & (attacked.margins <= 0)).any()
    assert seconds < 120, f"{seconds:.0f} s of CPU"


# --- the networks of SDP-CROWN (arXiv 2506.06665, ICML 2025), its 200 images each ---

# Name: eps, (stride, padding) of the convolutions, and what "bcp-alpha-crown" verifies of 200.
SDP = {
    "mnist_mlp": (1.0, [], 94),
    "mnist_convsmall": (0.3, [(2, 1), (2, 1)], 168),
    "cifar10_cnn_a": (24 / 255, [(2, 1), (2, 1)], 103),
    "cifar10_cnn_c": (24 / 255, [(2, 0), (2, 0)], 89),
    "cifar10_convsmall": (24 / 255, [(2, 0), (2, 0)], 94),
    "cifar10_convdeep": (24 / 255, [(2, 1), (1, 1), (1, 1), (2, 1)], 95),
}


def sdp_network(path: Path, geometry: list[tuple[int, int]]) -> nn.Sequential:
    """Convolutions and dense layers with ReLUs between, from a state dict in the order of the layers, in float64."""
    with np.load(path) as file:
        values = {name: torch.from_numpy(file[name]) for name in file}
    layers: list[nn.Module] = []
    convolutions = iter(geometry)
    names = [name.removesuffix(".weight") for name in values if name.endswith(".weight")]
    for name in names:
        weight = values[f"{name}.weight"]
        if weight.dim() == 4:
            layer: nn.Module = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], *next(convolutions))
        else:
            layers += [] if any(isinstance(made, nn.Flatten) for made in layers) else [nn.Flatten()]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": values[f"{name}.bias"]})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SDP)
def test_bcp_alpha_crown_verifies_more_than_sdp_crown(shared, name):
    """And never an image that PGD breaks."""
    eps, geometry, count = SDP[name]
    mnist, cifar = shared / "peers" / "sdp" / "mnist200.npz", shared / "data" / "cifar10_exact200"
    if not mnist.exists() or not cifar.exists():
        pytest.skip(f"{mnist} or {cifar} is not there")
    if name.startswith("mnist"):
        with np.load(mnist) as file:
            x, y = torch.from_numpy(file["x"]).double(), torch.from_numpy(file["y"]).long()
        ball = PerturbationLpNorm(eps, 2, 0.0, 1.0)
    else:
        x, y = torch.from_numpy(np.load(cifar / "X_sdp.npy")).double(), torch.from_numpy(np.load(cifar / "y_sdp.npy"))
        x, y = (x - torch.tensor([0.4914, 0.4822, 0.4465]).double()).movedim(3, 1) / 0.225, y.long()
        ball = PerturbationLpNorm(eps / 0.225, 2)
    net = sdp_network(shared / "peers" / "sdp" / f"{name}.npz", geometry)
    lower, _ = BoundedModule(net, x).compute_bounds(
        x=(BoundedTensor(x, ball),), C=margin_rows(y, 10, x.dtype), method="bcp-alpha-crown", bound_upper=False
    )
    verified = (lower > 0).all(1)
    assert int(verified.sum()) >= count
    assert not (verified & (PGD(20)(net, x, y, ball).margins <= 0)).any()
