"""Write `long.txt`, the tests whose first case takes over half a second, which `make quick` leaves out.

pytest --durations=0 --durations-min=1 -n 0 tests > log; python tests/long_tests.py log
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

LIMIT = 0.5  # seconds


def main() -> None:
    seconds: collections.Counter[str] = collections.Counter()  # of each case, its fixtures included
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        found = re.match(r"([0-9.]+)s (?:call|setup) +(.*)$", line.strip())
        if found:
            seconds[found[2]] += float(found[1])
    quickest: dict[str, float] = {}
    for case, taken in seconds.items():
        name = case.partition("[")[0].rpartition("/")[2]  # of the file, whatever its folder
        quickest[name] = min(taken, quickest.get(name, taken))
    names = sorted(name for name, taken in quickest.items() if taken > LIMIT)
    Path(__file__).with_name("long.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
