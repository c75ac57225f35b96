"""``lirpa-ext report``: all results of a run, a folder of results or a model, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..analysis.collect import collect


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext report``."""
    parser.set_defaults(run=_report)
    parser.add_argument("target", help="folder of fit, sweep, or of --out of certify and analyze; or a model file")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="DIR",
        help="a further folder of results; repeatable",
    )
    parser.add_argument("--title", default="", help="heading of the page")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default report.html in the folder, or MODEL.html")


def _report(arguments: argparse.Namespace) -> int:
    target = Path(arguments.target)
    page = collect(target, arguments.others, arguments.title)
    out = arguments.out or (target / "report.html" if target.is_dir() else target.with_suffix(".html"))
    page.write(out)
    print(f"written to {out}")
    return 0
