"""``lirpa-ext fit``, ``validate`` and ``test``: training from a YAML configuration, and its results."""

from __future__ import annotations

import argparse

_HELP = {
    "fit": "train with a certified loss, or resume",
    "validate": "certify a trained network on its validation samples",
    "test": "certify a trained network on the test split",
}


def add_training(commands: argparse._SubParsersAction) -> None:
    """Describe the three subcommands. Their arguments are those of the configuration, parsed by its own parser."""
    for name, text in _HELP.items():
        # No prefix: "--config" and all that follows are handed on as they are.
        command = commands.add_parser(name, help=text, prefix_chars="\0", add_help=False)
        command.add_argument("arguments", nargs="*")
        command.set_defaults(run=_run, command=name)


def _run(arguments: argparse.Namespace) -> int:
    from .training import require_lightning

    require_lightning()
    from .training.runs import evaluate, fit, parse

    config = parse(arguments.arguments, arguments.command)
    if arguments.command == "fit":
        fit(config)
    else:
        print(evaluate(config, arguments.command).table())
    print(f"written to {config.run}")
    return 0
