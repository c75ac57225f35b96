"""``lirpa-ext analyze NAME``: the analyses of `lirpa_ext.analysis` on models and runs, as table, files and plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.activity import plot_activity, plot_chords, relu_activity
from ..analysis.connectivity import CertifiedObjective, connect, plot_connectivity
from ..analysis.curves import plot_curves, verified_curves
from ..analysis.landscape import SmoothnessComparison, SmoothnessTrace, plot_smoothness
from ..analysis.lower_slopes import lower_slopes, plot_lower_slopes
from ..analysis.outer import outer_bound, plot_outer_bound
from ..analysis.tightness import MEASURES, plot_tightness, tightness
from ..analysis.traces import ActivityTrace, LipschitzTrace, Trace
from ..data import SOURCES
from ..errors import OptionError
from ..reporting.plots import figure, save
from ..reporting.results import Result
from ..training import OBJECTIVES, Loss
from ..training.trade_off import TradeOff, plot_trade_off, read_trade_off
from .certify import DATA_RANGE, add_data, add_model, numbers
from .task import ANALYSES, Analysis, Task, register_analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple[Result, "Figure"]


def add_analyze(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext analyze``: a subcommand for each analysis of `ANALYSES`."""
    for command, analysis in add_table(parser, "analyses", ANALYSES, _analyze):
        if not analysis.of_folders:
            task = command.add_argument_group("methods")
            task.add_argument("--methods", nargs="+", metavar="METHOD", help="bounds to compare")
            task.add_argument(
                "--option", action="append", default=[], metavar="METHOD.KEY=VALUE", help="of one; repeatable"
            )


def add_table(
    parser: argparse.ArgumentParser,
    title: str,
    table: Mapping[str, Analysis],
    run: Callable[[argparse.Namespace], int],
) -> Iterator[tuple[argparse.ArgumentParser, Analysis]]:
    """Add a subcommand for each entry of a table of analyses.

    Args:
        parser: Parser of the command.
        title: Heading of the subcommands in the help.
        table: Name of a subcommand -> analysis.
        run: Function of the parsed arguments that runs a subcommand and returns the exit status.

    Yields:
        Parser and analysis of each subcommand, so that the caller can add arguments before those of the analysis.
    """
    names = parser.add_subparsers(title=title, required=True, metavar="NAME")
    for name, entry in table.items():
        command = names.add_parser(name, help=entry.help, description=entry.help)
        command.set_defaults(run=run, name=name)
        kind, targets = "MODEL", "model files, or folders of lirpa-ext fit"
        if entry.of_folders:
            kind, targets = "FOLDER", "folders"
        command.add_argument("targets", nargs="+", metavar=kind, help=targets)
        if not entry.of_folders:
            add_settings(command)
        yield command, entry
        entry.add_arguments(command)
        command.add_argument("--out", type=Path, metavar="DIR", help="for NAME.json, .csv and .png")


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a `Task` on models: reading of the models, data, and ball."""
    add_model(command)
    data = add_data(command)
    data.add_argument("--data", help=f"default that of the run; {SOURCES}")
    data.add_argument("--data-range", type=numbers, metavar="LO,HI", help=f"default that of the run, else {DATA_RANGE}")
    task = command.add_argument_group("ball")
    task.add_argument("--norm", type=float, help="1 to inf, default that of the run, else 2")
    task.add_argument("--eps", type=numbers, help="in units of the raw input, default that of the run")


def _analyze(arguments: argparse.Namespace) -> int:
    tell(arguments.name, *ANALYSES[arguments.name].run(Task(arguments)), arguments.out)
    return 0


def tell(name: str, result: Result, drawn: Figure, out: Path | None) -> None:
    """Print a result, and write its numbers and plot into a folder.

    Args:
        name: Name of the files, without suffix.
        result: The numbers.
        drawn: The plot.
        out: The folder; None to write nothing.
    """
    print(result.table())
    print(result.summary())
    if out:
        result.save(out / name)
        save(drawn, out / f"{name}.png")
        print(f"written to {out}")


# --- the table ---


def _outer(task: Task) -> Drawn:
    x, y = task.sample
    result = outer_bound(
        task.model, x, int(y), task.eps, other=task.arguments.other, index=task.arguments.sample, **task.ball,
        **task.methods,
    )  # fmt: skip
    drawn, axes = figure(result.summary())
    plot_outer_bound(result, axes[0, 0])
    return result, drawn


def _outer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="number of the sample, default 0")
    parser.add_argument("--other", type=int, metavar="CLASS", help="the other logit, default the most probable class")


def _tightness(task: Task) -> Drawn:
    result = tightness(task.model, task.data, task.eps, **task.ball, **task.methods)
    drawn, axes = figure(result.summary(), columns=len(MEASURES))
    for ax, measure in zip(axes.flat, MEASURES, strict=True):
        plot_tightness(result, ax, measure)
    return result, drawn


def _curves(task: Task) -> Drawn:
    result = verified_curves(
        task.models, task.data, task.levels, targets=task.target_eps(), attack_steps=task.arguments.attack_steps,
        **task.ball, **task.methods,
    )  # fmt: skip
    drawn, axes = figure(result.summary())
    plot_curves(result, axes[0, 0])
    return result, drawn


def _curves_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attack-steps", type=int, default=20, help="of each of two runs of Auto-PGD, default 20; 0 for no attack"
    )


def _trade_off(task: Task) -> Drawn:
    runs = [run for path in task.targets.values() for run in read_trade_off(path).runs]
    result = TradeOff(runs)
    drawn, axes = figure(result.summary())
    plot_trade_off(result, axes[0, 0])
    return result, drawn


def _activity(task: Task) -> Drawn:
    result = relu_activity(task.model, task.data, task.eps, task.arguments.intermediate, **task.ball)
    drawn, axes = figure(result.summary(), columns=2)
    plot_activity(result, axes[0, 0])
    plot_chords(result, axes[0, 1])
    return result, drawn


def _activity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--intermediate", choices=("ibp", "bcp"), default="ibp", help="boxes, default ibp")


def _slopes(task: Task) -> Drawn:
    result = lower_slopes(task.model, task.data, task.levels, **task.ball, **task.methods)
    drawn, axes = figure(result.summary())
    plot_lower_slopes(result, axes[0, 0])
    return result, drawn


def _traces(task: Task, kind: type[Trace]) -> Drawn:
    result = kind.read(task.targets)
    return result, result.figure()


def _smoothness(task: Task) -> Drawn:
    traces = {name: SmoothnessTrace.load(path / "smoothness.json") for name, path in task.targets.items()}
    return SmoothnessComparison(traces), plot_smoothness(traces, task.arguments.at)


def _smoothness_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", choices=("scheduled", "target"), default="scheduled", help="of the picture")


def _connectivity(task: Task) -> Drawn:
    if len(task.targets) != 2:
        raise OptionError(f"a curve leads from one model to another, got {len(task.targets)}")
    own: dict[str, Any] = next(iter(task.configs.values())).get("model", {}).get("loss", {})
    name = task.arguments.loss or own.get("name")
    if name is None:
        raise OptionError(f"pass --loss, one of {', '.join(OBJECTIVES)}: only a run's folder says itself which")
    loss = Loss(**own) if own.get("name") == name else Loss(name)
    first, second = task.models.values()
    start, end = task.targets
    told = task.arguments
    result = connect(
        first, second, CertifiedObjective(loss, task.eps, **task.ball), task.data, steps=told.steps, lr=told.lr,
        batch_size=min(told.batch_size, len(task.data[0])), points=told.points, seed=told.seed,
        name=f"{name} loss at eps {task.eps:g}", ends=(start, end),
    )  # fmt: skip
    return result, plot_connectivity([result])


def _connectivity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(split="train")
    parser.add_argument(
        "--loss", choices=OBJECTIVES, help="that the curve is trained by, default that of the first run"
    )
    parser.add_argument("--steps", type=int, default=300, help="of training the curve, default 300")
    parser.add_argument("--lr", type=float, default=0.01, help="default 0.01")
    parser.add_argument("--batch-size", type=int, default=100, help="default 100")
    parser.add_argument("--points", type=int, default=21, help="of the curve to evaluate, default 21")
    parser.add_argument("--seed", type=int, default=0)


register_analysis(
    "outer", Analysis(_outer, "regions of two logits of a sample, by method (Fig. 3.2)", _outer_arguments)
)
register_analysis("tightness", Analysis(_tightness, "tau(x), worst margins and loss across methods (Fig. 3.3, 3.10)"))
register_analysis(
    "curves", Analysis(_curves, "verified accuracy over eps, models, methods (Fig. 3.4)", _curves_arguments)
)
register_analysis(
    "activity", Analysis(_activity, "active, unstable, dead ReLUs (Fig. C.6 to C.8)", _activity_arguments)
)
register_analysis("slopes", Analysis(_slopes, "shares of zero lower slopes over eps and methods (Fig. 3.11)"))
register_analysis("trade-off", Analysis(_trade_off, "clean and robust accuracy of sweeps (Fig. B.4)", of_folders=True))
register_analysis(
    "lipschitz",
    Analysis(partial(_traces, kind=LipschitzTrace), "Lipschitz constants in training (Fig. B.1, B.2)", of_folders=True),
)
register_analysis(
    "training-activity",
    Analysis(partial(_traces, kind=ActivityTrace), "ReLUs in training (Fig. 3.11, C.6 to C.8)", of_folders=True),
)
register_analysis(
    "smoothness",
    Analysis(
        _smoothness, "smoothness of the loss in training (Fig. 3.6 to 3.9)", _smoothness_arguments, of_folders=True
    ),
)
register_analysis(
    "connectivity",
    Analysis(
        _connectivity, "a curve of low loss between two models (C.5); on the training split", _connectivity_arguments
    ),
)
