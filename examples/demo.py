"""Train, export, import, certify: the whole way of a certified network, on one CPU.

    python examples/demo.py

A small conv net is trained with the BCP loss on scikit-learn's digits (8 x 8), saved, and written as ONNX. That
file is read back and certified against l2 perturbations with three methods. Files go to demo_results/.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lirpa_ext import BoundedModule, Report, certified_loss, certify, worst_case_logits
from lirpa_ext.data import load_digits
from lirpa_ext.models.loading import load_model, save_model

TRAINING_EPS = 0.5  # l2, in units of the image, whose pixels lie in [0, 1]
EVALUATION_EPS = (0.1, 0.2, 0.3, 0.4, 0.5)
METHODS = ("lipschitz", "bcp", "bcp-crown")
BATCH = 128


def conv_net() -> nn.Module:
    """Two convolutions and two dense layers for 8 x 8 images of ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Minimize (3.2.13) while eps and the weight of the robust loss rise from 0 over half of the epochs."""
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    bounded = BoundedModule(model, x[:BATCH])
    for epoch in range(epochs):
        ramp = min(1.0, epoch / (epochs / 2))
        for index in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:  # whole batches: one graph for all
            images, labels = x[index], y[index]
            logits = model(images)
            worst = worst_case_logits(
                bounded, images, labels, ramp * TRAINING_EPS, x_L=0.0, x_U=1.0, logits=logits, norms="estimate"
            )
            optimizer.zero_grad()
            certified_loss(logits, worst, labels, ramp).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write ONNX that takes any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another exporter
        torch.onnx.export(
            model, (x,), path, dynamo=False, opset_version=17, input_names=["image"], output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip


def print_table(reports: dict[str, Report]) -> None:
    """One line for each eps and method."""
    print(f"{'eps':>6}  {'method':<10} {'clean %':>8} {'PGD %':>8} {'verified %':>11}")
    for rows in zip(*(report.summary() for report in reports.values()), strict=True):
        for method, row in zip(reports, rows, strict=True):
            clean, pgd, verified = (100 * row[key] for key in ("clean", "pgd", "verified"))
            print(f"{row['eps']:>6.2f}  {method:<10} {clean:>8.1f} {pgd:>8.1f} {verified:>11.1f}")


def plot(reports: dict[str, Report], path: Path) -> None:
    """Verified accuracy at every eps, from the certified radii, and PGD's accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, report in reports.items():
        eps, verified = zip(*report.curve(), strict=True)
        percent = [100 * value for value in (*verified, 0.0)]
        axes.step([*eps, eps[-1]], percent, where="pre", label=f"{method}, verified")
    rows = next(iter(reports.values())).summary()
    axes.plot([row["eps"] for row in rows], [100 * row["pgd"] for row in rows], "ks", label="PGD")
    axes.axhline(100 * rows[0]["clean"], color="k", linestyle=":", label="clean")
    axes.set(xlabel="l2 eps", ylabel="accuracy, %", ylim=(0, 101), title="Digits, conv net trained with the BCP loss")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few epochs and images: does it run?")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for the files")
    arguments = parser.parse_args()
    epochs, images = (2, 16) if arguments.quick else (60, 200)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from more

    start, cpu = time.perf_counter(), time.process_time()
    print(f"training with the BCP loss, l2 eps up to {TRAINING_EPS}, {epochs} epochs ...")
    model = train(*load_digits("train"), epochs)
    print(f"  {time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU")

    x, y = (part[:images] for part in load_digits("test"))
    checkpoint, onnx = arguments.out / "digits.pt", arguments.out / "digits.onnx"
    save_model(model, checkpoint, architecture="demo:conv_net")
    export(model, x[:1], onnx)
    imported = load_model(onnx)

    start = time.perf_counter()
    print(f"certifying {len(x)} test images with the network of {onnx} ...")
    reports = {}
    for method in METHODS:
        reports[method] = certify(
            imported, (x, y), EVALUATION_EPS, norm=2, method=method, x_L=0.0, x_U=1.0, progress=sys.stderr.isatty()
        )
        reports[method].to_json(arguments.out / f"{method}.json")
    print(f"  {time.perf_counter() - start:.0f} s\n")
    print_table(reports)
    plot(reports, arguments.out / "verified_accuracy.png")
    names = ", ".join(sorted(path.name for path in arguments.out.iterdir()))
    print(f"\nin {arguments.out}/: {names}")


if __name__ == "__main__":
    main()
