"""``lirpa-ext fit``, ``validate``, ``test`` and ``sweep``: training from a YAML configuration, and evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

_HELP = {
    "fit": "train with a certified loss, or resume",
    "validate": "certify a trained network on its validation samples",
    "test": "certify a trained network on the test split",
}


def add_training(commands: argparse._SubParsersAction) -> None:
    """Add the subcommands of training; arguments of fit, validate and test go to the parser of the configuration."""
    for name, text in _HELP.items():
        # Without a prefix character, "--config" and all following arguments are passed on unchanged.
        command = commands.add_parser(name, help=text, prefix_chars="\0", add_help=False)
        command.add_argument("arguments", nargs="*")
        command.set_defaults(run=_run, command=name)

    command = commands.add_parser("sweep", help="train and test at several eps, losses and seeds: table and plot")
    command.add_argument("--eps", type=_words, default=(), help="radii to train at: 30/255,36/255,42/255")
    command.add_argument("--losses", type=_words, default=(), help="losses: bcp,lipschitz")
    command.add_argument("--seeds", type=_words, default=(), help="seeds: 0,1,2")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="one folder a run; resumed")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the arguments of fit, --config first")
    command.set_defaults(run=_sweep)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _sweep(arguments: argparse.Namespace) -> int:
    from ..training import keep_freed_memory, require_lightning

    require_lightning()
    keep_freed_memory()
    from ..training.sweep import Grid, sweep, table

    given = [text for text in arguments.arguments if text != "--"]
    grid = Grid(arguments.eps, arguments.losses, arguments.seeds)
    print(table(sweep(given, grid, arguments.out)))
    print(f"written to {arguments.out}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from ..training import keep_freed_memory, require_lightning

    require_lightning()
    keep_freed_memory()
    from ..training.runs import evaluate, fit, parse

    config = parse(arguments.arguments, arguments.command)
    if arguments.command == "fit":
        fit(config)
    else:
        print(evaluate(config, arguments.command).table())
    print(f"written to {config.run}")
    return 0
