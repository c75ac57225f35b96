"""Fuzz the bounds: `make fuzz SECONDS=60 SEED=...`; docs/fuzzing.md says what that does."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fuzz.session import run


@contextlib.contextmanager
def quiet() -> Iterator[TextIO]:
    """Silence the terminal, to which the exporter writes whatever Python is told; gives a stream that is heard."""
    before = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    try:
        with os.fdopen(os.dup(before[0]), "w", encoding="utf-8") as out:
            yield out
    finally:
        os.dup2(before[0], 1), os.dup2(before[1], 2)


def main() -> int:
    """Run a session; 1 if a bound was violated or an error was not the package's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, default 60")
    parser.add_argument("--seed", type=int, default=None, help="of the first network, default a fresh one")
    parser.add_argument("--graphs", type=int, default=None, help="stop after so many networks")
    parser.add_argument("--methods", default="", help="the only methods to call, separated by blanks")
    parser.add_argument("--operations", default="", help="the only operations (fuzz.growing.OPERATIONS), likewise")
    parser.add_argument("--json", default="", help="write the numbers to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # the engine logs what it cannot do; here that is counted
    seed = random.SystemRandom().randrange(10**6) * 1000 if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    allowed = set(options.operations.split()).__contains__ if options.operations else None
    with quiet() as out:
        summary = run(options.seconds, seed, options.methods.split() or None, allowed, options.graphs, out)
    print(summary.text(), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(summary.table(), indent=1), encoding="utf-8")
    return int(summary.failed)


if __name__ == "__main__":
    sys.exit(main())
