"""Read hostile files, each within 10 s of processor time and 2 GiB, and tell what came of it, a line of JSON each.

A process of its own: what hangs is killed by the kernel, whatever code it hangs in.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from lirpa_ext.errors import LirpaExtError

SECONDS, BYTES = 10.0, 2**31


def limit_memory(more):
    """Let this process take only so many more bytes; None for no limit."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else taken + more, hard))


def outcome(module, make, folder):
    """How reading one case ended: its error, whether that is one of ours, seconds and peak memory."""
    source = make(folder)
    limit_memory(BYTES)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of reading
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # then SIGPROF ends the process
    signal.alarm(6 * int(SECONDS))  # and SIGALRM one that waits
    start, error, ours = time.process_time(), None, True
    try:
        module.read(source)
    except LirpaExtError as caught:
        error = f"{type(caught).__name__}: {caught}"
    except BaseException:
        error, ours = traceback.format_exc(), False
    seconds = time.process_time() - start
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    limit_memory(None)
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return {"error": error, "ours": ours, "seconds": seconds, "peak": peak}


def main(folder, cases):
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warmed = set()
    for case in cases:
        kind, name = case.split("/")
        module = importlib.import_module(f"hostile.{kind}")
        if kind not in warmed:
            getattr(module, "warm", lambda: None)()
            warmed.add(kind)
        own = Path(folder) / case
        own.mkdir(parents=True)
        os.chdir(own)
        make, _ = (module.CASES | getattr(module, "SLOW", {}))[name]
        print(json.dumps({"case": case} | outcome(module, make, own)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
