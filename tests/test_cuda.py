"""On a GPU: the same bounds as on the CPU, sound with tensor cores too, and every path from a model to a result.

The rest of the suite runs on the CPU; these tests skip where there is no GPU.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from soundness import assert_sound
from torch import nn

import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.attacks import EOT, FGSM, PGD
from lirpa_ext.certification import evaluate
from lirpa_ext.cli import main
from lirpa_ext.domain.specifications import margin_rows
from lirpa_ext.methods import label_option
from lirpa_ext.randomized import REGULARIZERS, gradients, make_adv_bnn, make_rse, predict, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

ROOT = Path(__file__).resolve().parent.parent
L2 = ("lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown")
SLOPES = ("sparse-slope", "slope:crown", "slope:cap", "slope:random", "slope:ibp", "cap")
ENGINES = ("IBP", "CROWN-IBP", "CROWN")
GPU = "cuda"


def conv(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16),
        nn.ReLU(), nn.Linear(16, 5),
    ).to(dtype).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3])


def bounds(model, x, labels, method, norm, device, **more):
    ball = PerturbationLpNorm(0.1, norm, 0.0, 1.0)
    model, x, labels = model.to(device), x.to(device), labels.to(device)
    return BoundedModule(model, x).compute_bounds(
        x=(BoundedTensor(x, ball),),
        C=margin_rows(labels, 5, x.dtype),
        method=method,
        **label_option(method, labels),
        **more,
    )


@pytest.mark.parametrize("method", [*L2, *SLOPES, *ENGINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bounds_are_those_of_the_cpu(images, labels, method, dtype):
    norm = math.inf if method in SLOPES else 2
    more = {"seed": 0} if method in ("slope:random", "sparse-slope") else {}  # of draws on the CPU
    expected = bounds(conv(dtype), images.to(dtype), labels, method, norm, "cpu", **more)
    found = bounds(conv(dtype), images.to(dtype), labels, method, norm, GPU, **more)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == GPU
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown", "slope:ibp", "cap"])
def test_outward_rounding_covers_what_the_gpu_computes(method, tensor_cores):
    """A ball of radius 0 is a point, whose bounds in float32 must still hold the exact value, tensor cores or not."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )  # fmt: skip
    x = torch.rand(8, 3, 8, 8)
    exact = model.double()(x.double()).detach()
    model, x = model.float().to(GPU), x.to(GPU)
    ball = BoundedTensor(x, PerturbationLpNorm(0.0, math.inf if method in SLOPES else 2))
    lower, upper = BoundedModule(model, x).compute_bounds(x=(ball,), method=method, outward=True)
    assert (lower.double().cpu() <= exact).all()
    assert (upper.double().cpu() >= exact).all()


@pytest.mark.parametrize("method", ["bcp", "bcp-crown", "sparse-slope", "IBP"])
def test_bounds_of_the_gpu_hold_on_points_of_the_set(images, labels, method):
    norm = math.inf if method in SLOPES else 2
    model, x = conv(torch.float64), images.double()
    lower, upper = bounds(model, x, labels, method, norm, GPU)
    ball, rows = PerturbationLpNorm(0.1, norm, 0.0, 1.0), margin_rows(labels, 5)
    assert_sound(model.cpu(), x, ball, (lower.detach().cpu(), upper.detach().cpu()), rows)


def test_a_data_set_is_certified_as_on_the_cpu(images, labels):
    reports = [
        lirpa_ext.certify(
            conv(), (images, labels), [0.05, 0.2], x_L=0.0, x_U=1.0, method="bcp-crown", device=device, progress=False
        )
        for device in ("cpu", GPU)
    ]
    radii = [[record["radius"] for record in report.records] for report in reports]
    assert radii[0] == pytest.approx(radii[1], abs=2e-3)
    a, b = ([[level["status"] for level in record["levels"]] for record in report.records] for report in reports)
    assert a == b


def test_training_losses_have_gradients(images, labels):
    model = conv().to(GPU)
    x, y = images.to(GPU), labels.to(GPU)
    for method, norm, options in (
        ("bcp", 2, {"norms": "estimate"}),
        ("sparse-slope", math.inf, {}),
        ("CROWN-IBP", math.inf, {}),
    ):
        model.zero_grad()
        bounded = BoundedModule(model, x)
        logits = model(x)
        worst = lirpa_ext.worst_case_logits(bounded, x, y, 0.1, method, norm, logits=logits, **options)
        lirpa_ext.certified_loss(logits, worst, y, 0.5).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("make", [make_rse, make_adv_bnn])
def test_randomized_networks(make, images, labels):
    model, x, y = make(conv()).to(GPU).eval(), images.to(GPU), labels.to(GPU)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(model, generator, 3)
    torch.testing.assert_close(drawn.each(x), drawn.each(x), rtol=0, atol=0)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(predict(model, x, 4).sum(1), torch.ones(4, device=GPU))
    found = gradients(model, x, y, 3, generator)
    assert found.shape == (3, 4, 64) and found.device.type == GPU
    for regularizer in REGULARIZERS.values():
        model.zero_grad()
        regularizer(found).mean().backward(retain_graph=True)
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    accuracy = evaluate(model, (images, labels), [0.0, 0.1], EOT(PGD(3), 2), draws=3)
    assert accuracy.levels == evaluate(model, (images, labels), [0.0, 0.1], EOT(PGD(3), 2), draws=3).levels


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("attack", [FGSM(), PGD(5, 2), PGD(5, momentum=1.0), EOT(PGD(5), 3)])
def test_adversarial_points_lie_in_the_set(attack, norm, images, labels):
    model, x, y = conv().to(GPU), images.to(GPU), labels.to(GPU)
    points = attack(model, x, y, PerturbationLpNorm(0.1, norm, 0.0, 1.0), torch.Generator().manual_seed(0)).inputs
    assert points.device.type == GPU
    assert torch.linalg.vector_norm((points - x).flatten(1), norm, dim=1).max() <= 0.1 + 1e-6
    assert points.min() >= 0
    assert points.max() <= 1


@pytest.mark.parametrize("config", ["digits_bcp.yaml", "digits_adv-bnn_graddiv.yaml"])
def test_a_run_trains_and_is_tested(config, tmp_path):
    pytest.importorskip("lightning", reason="training needs Lightning")
    pytest.importorskip("jsonargparse", reason="training needs jsonargparse")

    def run(command):
        return main([
            command, "--config", str(ROOT / "configs" / config), "--data.limit", "260", "--data.validation", "20",
            "--data.batch_size", "40", "--data.test_limit", "30", "--trainer.max_epochs", "3",
            "--model.schedule.warmup", "0.5", "--model.schedule.ramp", "1", "--trainer.accelerator", "gpu",
            "--trainer.devices", "1", "--trainer.logger", "false", "--progress", "false", "--run", str(tmp_path),
        ])  # fmt: skip

    assert run("fit") == 0
    assert run("test") == 0
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == torch.cuda.get_device_name()
