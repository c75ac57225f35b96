"""Write `long.txt`, the tests whose first case takes over a second, which `make quick` leaves out.

pytest --durations=0 --durations-min=1 -n 0 tests > log; python tests/long_tests.py log
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LIMIT = 1.0  # seconds


def main() -> None:
    first: dict[str, float] = {}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        found = re.match(r"([0-9.]+)s (?:call|setup) +(\S+?)(\[.*)?$", line.strip())
        if found:
            name = found[2].rpartition("/")[2]  # of the file, whatever its folder
            first[name] = min(float(found[1]), first.get(name, 1e9))
    names = sorted(name for name, seconds in first.items() if seconds > LIMIT)
    Path(__file__).with_name("long.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
