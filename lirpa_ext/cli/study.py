"""``lirpa-ext study NAME``: a study of `lirpa_ext.analysis.studies` on models and runs, as table, files and plot."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torch import nn

from ..analysis.studies.gradients import (  # fmt: skip
    concentrations,
    cosine_matrix,
    gradient_scatter,
    plot_concentrations,
    plot_cosines,
    plot_scatter,
)
from ..analysis.studies.robustness import (  # fmt: skip
    accuracy_study,
    loss_increase,
    plot_accuracy,
    plot_loss_increase,
    plot_transfer,
    transfer_matrix,
)
from ..analysis.studies.training import ConcentrationTrace
from ..attacks import ATTACKS, EOT, FGSM, LOSSES, PGD, Attack, AutoAttack, make_attack
from ..attacks.eot import AVERAGES, KEPT
from ..errors import OptionError
from ..reporting.plots import figure
from ..reporting.results import Result
from .analyze import add_table, tell
from .task import Analysis, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple[Result, "Figure"]


def add_study(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext study``: a subcommand for each study of `STUDIES`."""
    for command, study in add_table(parser, "studies", STUDIES, _study):
        if not study.of_folders:
            command.add_argument("--seed", type=int, default=0, help="of all draws, default 0")


def _study(arguments: argparse.Namespace) -> int:
    tell(arguments.name, *STUDIES[arguments.name].run(Task(arguments)), arguments.out)
    return 0


# --- attacks by name ---


def _add_attack(parser: argparse.ArgumentParser, draws: str = "20") -> None:
    group = parser.add_argument_group("attack")
    group.add_argument("--attack", default="pgd", metavar="NAME", help=f"default pgd; {', '.join(ATTACKS)}")
    group.add_argument("--steps", type=int, default=20, help="of PGD, default 20")
    group.add_argument("--step-size", type=float, default=0.25, help="of PGD, as a fraction of eps, default 0.25")
    group.add_argument("--restarts", type=int, default=1, help="of PGD, default 1; more start at random points")
    group.add_argument("--random-start", action="store_true", help="of PGD, of a single run too")
    group.add_argument("--momentum", type=float, default=0.0, help="of PGD, default 0")
    group.add_argument("--loss", choices=LOSSES, default="cross-entropy", help="default cross-entropy")
    if draws:
        group.add_argument("--attack-draws", type=_whole, default=_whole(draws), metavar="N", help=f"default {draws}")
        group.add_argument("--average", choices=AVERAGES, default="gradients", help="of what over draws")
        group.add_argument("--keep", choices=KEPT, help="which points count, default final for randomized models")


def _whole(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _attack(arguments: argparse.Namespace) -> Attack:
    """The attack of the arguments, without EOT."""
    if arguments.attack == "autoattack":
        return AutoAttack("rand")
    if arguments.attack == "fgsm":
        return FGSM(arguments.loss)
    if arguments.attack != "pgd":
        return make_attack(arguments.attack, steps=arguments.steps, restarts=arguments.restarts)
    restarts, start = arguments.restarts, arguments.random_start or arguments.restarts > 1
    return PGD(arguments.steps, restarts, arguments.step_size, arguments.loss, start, arguments.momentum)


def _eot(arguments: argparse.Namespace) -> EOT:
    if len(arguments.attack_draws) > 1:
        raise OptionError(f"this study takes one --attack-draws, got {len(arguments.attack_draws)}")
    return EOT(_attack(arguments), arguments.attack_draws[0], arguments.average, arguments.keep)


# --- the table ---


def _add_draws(parser: argparse.ArgumentParser, sample: bool = True) -> None:
    parser.add_argument("--draws", type=int, default=100, help="gradients of each sample, default 100")
    if sample:
        parser.add_argument("--sample", type=int, default=0, metavar="N", help="number of the sample, default 0")


def _scatter(task: Task) -> Drawn:
    result = gradient_scatter(task.models, *task.sample, task.arguments.draws, task.arguments.seed)
    drawn, axes = figure(result.summary(), size=(5.0, 5.0))
    plot_scatter(result, axes[0, 0])
    return result, drawn


def _cosines(task: Task) -> Drawn:
    result = cosine_matrix(task.models, *task.sample, task.arguments.draws, task.arguments.seed)
    return result, _panels(result, plot_cosines, task.models)


def _concentrations(task: Task) -> Drawn:
    result = concentrations(task.models, *task.data, task.arguments.draws, task.arguments.seed)
    drawn, axes = figure(result.summary())
    plot_concentrations(result, axes[0, 0], task.arguments.form)
    return result, drawn


def _add_concentrations(parser: argparse.ArgumentParser) -> None:
    _add_draws(parser, sample=False)
    parser.add_argument("--form", choices=("printed", "banerjee", "rho"), default="printed", help="what is drawn")


def _loss_increase(task: Task) -> Drawn:
    result = loss_increase(
        task.models, task.data, task.eps, _eot(task.arguments), **task.ball, draws=task.arguments.ensemble,
        seed=task.arguments.seed,
    )  # fmt: skip
    drawn, axes = figure(result.summary())
    plot_loss_increase(result, axes[0, 0])
    return result, drawn


def _add_loss_increase(parser: argparse.ArgumentParser) -> None:
    _add_attack(parser)
    parser.add_argument("--ensemble", type=int, default=20, help="fresh draws that the loss is averaged over")


def _accuracy(task: Task) -> Drawn:
    arguments = task.arguments
    result = accuracy_study(
        task.models, task.data, task.levels, arguments.attack_draws, _attack(arguments), **task.ball,
        average=arguments.average, keep=arguments.keep, ensemble=arguments.ensemble, seed=arguments.seed,
    )  # fmt: skip
    drawn, axes = figure(result.summary())
    plot_accuracy(result, axes[0, 0], arguments.over)
    return result, drawn


def _add_accuracy(parser: argparse.ArgumentParser) -> None:
    _add_attack(parser, draws="5,10,20")
    parser.add_argument("--ensemble", type=int, default=20, help="fresh draws that judge")
    parser.add_argument("--over", choices=("eps", "draws"), default="eps", help="horizontal axis of the picture")


def _transfer(task: Task) -> Drawn:
    result = transfer_matrix(
        task.models, task.data, task.eps, task.arguments.networks, _attack(task.arguments), **task.ball,
        seed=task.arguments.seed,
    )  # fmt: skip
    return result, _panels(result, plot_transfer, task.models)


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    _add_attack(parser, draws="")
    parser.add_argument("--networks", type=int, default=50, help="drawn of each model, default 50")


def _training(task: Task) -> Drawn:
    result = ConcentrationTrace.read(task.targets)
    drawn, axes = figure(result.summary(), columns=len(result.PANELS))
    for ax, panel in zip(axes.flat, result.PANELS, strict=True):
        result.plot(ax, panel)
    return result, drawn


def _panels(result: Any, plot: Any, models: dict[str, nn.Module]) -> Figure:
    """A figure with axes for each model, drawn by `plot`(result, axes, name)."""
    drawn, axes = figure(result.summary(), columns=len(models), size=(4.2 * len(models), 3.8))
    for ax, name in zip(axes.flat, models, strict=True):
        plot(result, ax, name)
    return drawn


STUDIES: dict[str, Analysis] = {
    "concentration": Analysis(_training, "concentration of gradients in training (Fig. 2.3)", of_folders=True),
    "scatter": Analysis(_scatter, "gradients of one sample in a plane (Fig. 2.4)", _add_draws),
    "loss-increase": Analysis(_loss_increase, "what an attack adds to the loss (Fig. 2.5)", _add_loss_increase),
    "kappa": Analysis(_concentrations, "concentration of each sample's gradients (Fig. 2.6)", _add_concentrations),
    "accuracy": Analysis(_accuracy, "accuracy over eps and attack draws (Fig. 2.7, A.5, Table 2.1)", _add_accuracy),
    "transfer": Analysis(_transfer, "transfer between drawn networks (Fig. 2.8)", _add_transfer),
    "cosines": Analysis(_cosines, "cosines of pairs of gradients (Fig. 2.9)", _add_draws),
}
