"""The source's qualitative findings on tightness, ReLU activity and Lipschitz constants, checked one by one.

Trains small networks, in groups: three on the digits in l2, four in l-infinity, two on MNIST in l2 (runs that are there
go on, or are taken as they are). The group "official" are the MNIST networks of the source's own codes, in
``bcp_mnist_state_dict.npz`` and ``slope_mnist_state_dict.npz`` of --reference. Prints what the source says, what came
out, and whether it agrees; writes ``benchmarks/findings.json`` and from all groups in it the table in
``docs/analyses.md``.

    python benchmarks/findings.py [--groups "digits l2" "MNIST l2" official] [--mnist data/mnist] [--reference FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lirpa_ext.analysis import ActivityTrace, LipschitzTrace, lower_slopes, tightness, verified_curves
from lirpa_ext.analysis.traces import PRODUCT
from lirpa_ext.data import Pair, load_data
from lirpa_ext.models.loading import load_model
from lirpa_ext.training import Network, build
from lirpa_ext.training.runs import fit, parse

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULT = ROOT / "docs" / "analyses.md", Path(__file__).with_suffix(".json")
CALLBACKS = "[{class_path: lirpa_ext.analysis.LipschitzConstants}, {class_path: lirpa_ext.analysis.ReluActivity}]"
RANGE = {"x_L": 0.0, "x_U": 1.0}
SLOPES = ("sparse-slope", "slope:crown", "slope:cap", "slope:random")

# Group: configuration, what it changes, losses.
SQUARE = ("--model.norm", "inf", "--model.eps", "0.1", "--model.initialization", "ibp", "--trainer.max_epochs", "24",
          "--model.schedule.ramp", "16", "--model.optimizer.decay.milestones", "[18, 21]")  # fmt: skip
GROUPS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "digits l2": ("digits_bcp", ("--trainer.max_epochs", "25"), ("bcp", "lipschitz", "natural")),
    "digits linf": ("digits_bcp", SQUARE, ("sparse-slope", "ibp", "crown-ibp", "cap-ibp")),
    "MNIST l2": ("mnist_bcp_reference", (), ("bcp", "lipschitz")),
}
Finding = dict[str, Any]


def train(group: str, folder: Path, mnist: str | None = None) -> dict[str, Path]:
    """Fit each network of a group, or go on with what is in its folder; folders by loss."""
    name, changes, losses = GROUPS[group]
    source = ("--data.source", str(mnist)) if group.startswith("MNIST") else ()
    runs = {loss: folder / f"{group.replace(' ', '_')}_{loss}" for loss in losses}
    for loss, run in runs.items():
        print(f"training {run.name}, unless it is done ...", flush=True)
        fit(parse([
            "--config", str(ROOT / "configs" / f"{name}.yaml"), "--model.loss.name", loss, "--run", str(run),
            *source, *changes, "--model.evaluation.attack_steps", "0", "--trainer.callbacks", CALLBACKS,
            "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
        ]))  # fmt: skip
    return runs


def official(folder: Path, name: str) -> nn.Module:
    """A network of the source's official codes."""
    model = build(Network("2C2F", [1, 28, 28]))
    with np.load(folder / f"{name}_mnist_state_dict.npz") as state:
        model.load_state_dict({key: torch.from_numpy(state[key]) for key in state})
    return model


def finding(said: str, where: str, on: str, measured: str, agrees: bool) -> Finding:
    return {"said": said, "where": where, "on": on, "measured": measured, "agrees": bool(agrees)}


# --- the findings ---


def outer_bounds(on: str, model: nn.Module, data: Pair, eps: float) -> Iterator[Finding]:
    """BCP against the ball, on one l2 network."""
    plain, ours = (
        tightness(model, data, eps, ["lipschitz", "bcp"], options={"bcp": {"tighten": tighten}}, **RANGE)
        for tighten in (False, True)
    )
    gain, more = plain.tightened("bcp") or math.nan, ours.tightened("bcp") or math.nan
    measured = f"tau is {gain:.1f}% lower ({more:.1f}% with the package's tightening)"
    said = "BCP tightens the outer bound against the ball, by 55.4% on MNIST"
    yield finding(said, "Fig. 3.3", on, measured, gain > 0)


def relaxations(on: str, model: nn.Module, data: Pair, eps: float) -> Iterator[Finding]:
    """The relaxations of one l-infinity network: tightness and loss."""
    found = tightness(model, data, eps, SLOPES, norm=math.inf, **RANGE)
    margins, losses = ({name: float(v.mean()) for name, v in m.items()} for m in (found.margins, found.loss))
    told = "; ".join(f"{name.removeprefix('slope:')} {margins[name]:.3g} ({losses[name]:.3g})" for name in SLOPES)
    tightest = all(min(values, key=lambda n: values[n]) == SLOPES[0] for values in (margins, losses))
    measured = f"sum of margins (loss): {told}"
    yield finding("One-step is the tightest relaxation, in margins and loss", "Fig. 3.10, C.9", on, measured, tightest)
    ordered = sorted(SLOPES, key=lambda name: margins[name]) == list(SLOPES)
    yield finding("... followed by CROWN-IBP, CAP-IBP, RANDOM", "C.11", on, "the same", ordered)


def sparsity(on: str, model: nn.Module, data: Pair, levels: list[float]) -> Iterator[Finding]:
    """Lower slopes over eps."""
    found = lower_slopes(model, data, levels, SLOPES[:2], norm=math.inf, **RANGE)
    zeros = {name: found.sparsity(name)[1] for name in SLOPES[:2]}
    told = {name: ", ".join(f"{100 * zero:.1f}" for zero in values) for name, values in zeros.items()}
    at = ", ".join(f"{eps:g}" for eps in levels)
    rises = all(a < b for a, b in zip(zeros[SLOPES[0]], zeros[SLOPES[0]][1:], strict=False))
    yield finding("One-step slopes get sparser as eps rises", "3.3.3", on,
                  f"zero slopes, %, at eps {at}: {told[SLOPES[0]]}", rises)  # fmt: skip
    fewer = all(a > b for a, b in zip(zeros[SLOPES[0]], zeros[SLOPES[1]], strict=True))
    yield finding("One-step has fewer non-zero slopes than CROWN-IBP", "Fig. 3.11", on,
                  f"zero slopes of CROWN-IBP, %: {told[SLOPES[1]]}", fewer)  # fmt: skip


def constants(on: str, runs: dict[str, Path]) -> Iterator[Finding]:
    """Lipschitz constants through training."""
    trace = LipschitzTrace.read(runs)
    if "natural" in runs:
        grown = [value for _, value in trace.values("natural", PRODUCT)]
        yield finding("The Lipschitz constant keeps increasing in standard training", "Fig. B.1", on,
                      f"{grown[0]:.3g} to {grown[-1]:.3g}", all(np.diff(grown) > 0))  # fmt: skip
    values = dict(trace.values("bcp", PRODUCT))
    top = max(values, key=lambda epoch: values[epoch])
    last = max(values)
    falls = values[last] < values[top] and all(np.diff([v for e, v in values.items() if e >= top]) < 0)
    yield finding("... and keeps decreasing in BCP training", "Fig. B.1", on,
                  f"{values[0]:.3g}, highest {values[top]:.3g} after epoch {top}, at the end {values[last]:.3g}", falls
                  )  # fmt: skip
    ratio = trace.ratio("bcp", "lipschitz")[-1][1]
    yield finding("BCP ends with a larger constant of all layers but the last than training without boxes, by 17.2%",
                  "Fig. B.2", on, f"{100 * (ratio - 1):+.1f}%", ratio > 1)  # fmt: skip


def accuracy(on: str, runs: dict[str, Path], data: Pair, target: float) -> Iterator[Finding]:
    """Verified accuracy over eps, each network by its own method."""
    levels = [target * k / 8 for k in range(13)]
    rates = {
        loss: verified_curves({loss: load_model(run / "model.pt")}, data, levels, [loss], attack_steps=0, **RANGE)
        .curve(loss, loss)[1]
        for loss, run in runs.items()
        if loss != "natural"
    }  # fmt: skip
    shown = "; ".join(
        f"{loss} " + ", ".join(f"{100 * values[k]:.1f}" for k in (0, 4, 8, 12)) for loss, values in rates.items()
    )
    best = all(a >= b for a, b in zip(rates["bcp"], rates["lipschitz"], strict=True))
    yield finding("BCP has the highest verified accuracy over a wide range of eps", "Fig. 3.4", on,
                  f"% at 0, 1/2, 1 and 3/2 of the target: {shown}", best)  # fmt: skip
    straight = float(np.corrcoef(levels, rates["bcp"])[0, 1] ** 2)
    yield finding(
        "... which decreases almost linearly", "Fig. 3.4", on, f"R^2 of a line {straight:.3f}", straight > 0.95
    )


def neurons(on: str, runs: dict[str, Path]) -> Iterator[Finding]:
    """ReLUs at the end of the ramp, and how they got there."""
    trace = ActivityTrace.read(runs)
    end = {run: trace.ramp_end(run) for run in trace.runs()}
    at = {
        panel: {run: dict(trace.values(run, panel))[end[run]] for run in trace.runs()} for panel in ("active", "dead")
    }
    shown = {panel: ", ".join(f"{run} {value:.1f}" for run, value in values.items()) for panel, values in at.items()}
    yield finding("CROWN-IBP has more active ReLUs than the others", "Fig. C.6", on, f"active, %: {shown['active']}",
                  max(at["active"], key=lambda run: at["active"][run]) == "crown-ibp")  # fmt: skip
    yield finding("... and the fewest dead ones", "Fig. C.6", on, f"dead, %: {shown['dead']}",
                  min(at["dead"], key=lambda run: at["dead"][run]) == "crown-ibp")  # fmt: skip
    moved = {}
    for run in ("crown-ibp", "cap-ibp"):
        chords = [value for epoch, value in trace.values(run, "chord") if epoch <= (end[run] or 0)]
        moved[run] = (chords[0], chords[-1])
    told = "; ".join(f"{run} {a:.2f} to {b:.2f}" for run, (a, b) in moved.items())
    right = moved["crown-ibp"][1] > moved["crown-ibp"][0]
    yield finding("Chords of unstable ReLUs move right in CROWN-IBP's ramp", "Fig. C.8", on, f"mean: {told}", right)
    nonzero = {run: trace.values(run, "nonzero") for run in ("sparse-slope", "crown-ibp")}
    last = {run: dict(values)[end[run]] for run, values in nonzero.items()}
    told = ", ".join(f"{run} {value:.1f}" for run, value in last.items())
    yield finding("Trained with it, one-step has fewer non-zero slopes than CROWN-IBP", "Fig. 3.11", on,
                  f"non-zero at the end of the ramp, %: {told}", last["sparse-slope"] < last["crown-ibp"])  # fmt: skip


def collect(group: str, arguments: argparse.Namespace) -> Iterator[Finding]:
    """The findings of a group."""
    digits = group.startswith("digits")
    data = load_data("digits" if digits else arguments.mnist, "test", arguments.samples)
    if group == "official":
        yield from outer_bounds("MNIST, official", official(arguments.reference, "bcp"), data, 1.58)
        slope = official(arguments.reference, "slope")
        yield from relaxations("MNIST, official", slope, data, 0.2)
        yield from sparsity("MNIST, official", slope, data, [0.1, 0.2, 0.3, 0.4])
        return
    runs = train(group, arguments.runs, arguments.mnist)
    if group == "digits linf":
        for loss in ("sparse-slope", "crown-ibp", "ibp"):
            yield from relaxations(f"digits, {loss}", load_model(runs[loss] / "model.pt"), data, 0.1)
        network = load_model(runs["sparse-slope"] / "model.pt")
        yield from sparsity("digits, sparse-slope", network, data, [0.025, 0.05, 0.1])
        yield from neurons("digits", runs)
        return
    on, eps = group.split()[0], 0.5 if digits else 1.58
    yield from outer_bounds(on, load_model(runs["bcp"] / "model.pt"), data, eps)
    yield from constants(on, runs)
    yield from accuracy(on, runs, data, eps)


def markdown(groups: dict[str, Any]) -> str:
    """The table of the page."""
    lines = ["| the source | where | networks (images) | here | agrees |", "|---|---|---|---|---|"]
    for group in groups.values():
        for row in group["findings"]:
            verdict, on = "yes" if row["agrees"] else "**no**", f"{row['on']} ({group['samples']})"
            lines.append(f"| {row['said']} | {row['where']} | {on} | {row['measured']} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["digits l2", "digits linf"], choices=[*GROUPS, "official"])
    parser.add_argument("--mnist", help="folder of MNIST's files, for the groups on MNIST")
    parser.add_argument("--reference", type=Path, help="folder of the official codes' weights")
    parser.add_argument("--runs", type=Path, default=Path("runs/findings"))
    parser.add_argument("--samples", type=int, default=200, help="test images, default 200")
    arguments = parser.parse_args()
    if any("digits" not in group for group in arguments.groups) and arguments.mnist is None:
        parser.error("the groups MNIST l2 and official need --mnist")
    if "official" in arguments.groups and arguments.reference is None:
        parser.error("the group official needs --reference")
    torch.set_num_threads(1)
    groups = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for group in arguments.groups:
        groups[group] = {"samples": arguments.samples, "findings": []}
        for row in collect(group, arguments):
            groups[group]["findings"].append(row)
            verdict = "agrees" if row["agrees"] else "DIFFERS"
            print(f"{verdict}: {row['said']} ({row['on']}): {row['measured']}", flush=True)
        RESULT.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        start, end = (page.index(f"<!-- findings: {part} -->") for part in ("start", "end"))
        table = markdown(groups)
        PAGE.write_text(f"{page[:start]}<!-- findings: start -->\n\n{table}\n\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
