"""The command line, ``lirpa-ext``: it parses arguments, calls the API and prints. Subcommands are modules here."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import LirpaExtError
from ..extensions import load_extensions
from .analyze import add_analyze
from .certify import add_certify
from .fit import add_training
from .inspect import add_inspect
from .report import add_report
from .study import add_study
from .task import Analysis, Task, register_analysis
from .verify import add_verify

__all__ = ["Analysis", "Task", "main", "register_analysis"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lirpa-ext``.

    Args:
        argv: Arguments, default those of the process.

    Returns:
        Exit status: 0 for success (``verify`` and ``inspect`` have further ones), 2 for a `LirpaExtError`, whose
        message goes to stderr, and 130 for an interruption.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    load_extensions()
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except LirpaExtError as error:
        print(f"lirpa-ext: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lirpa-ext: interrupted; the same command goes on from what is in --out", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lirpa-ext", description="Certified robustness on auto_LiRPA.")
    parser.add_argument("--version", action="version", version=f"lirpa-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    add_certify(commands.add_parser("certify", help="certify a model on a data set"))
    add_inspect(commands.add_parser("inspect", help="what is in an ONNX file, and which methods can bound it"))
    add_study(commands.add_parser("study", help="study randomized models: gradients, attacks, transfer"))
    add_verify(commands.add_parser("verify", help="verify a VNN-LIB property of an ONNX network"))
    add_training(commands)
    add_analyze(commands.add_parser("analyze", help="look at tightness and activity: numbers and pictures"))
    add_report(commands.add_parser("report", help="gather a run's tables and plots into one HTML page"))
    return parser
