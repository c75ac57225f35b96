"""Write the list of what the engine at hand is trusted with: ``python tests/engine/make_list.py``.

Runs the contract suite on every case of the catalogue. A kind of node in a configuration is listed for a family of
bounds if at least one bound was attacked, and every one held. Takes some ten minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from catalogue import ACTIVATIONS, FUNCTIONS, catalogue
from contract import Observation, observe

from lirpa_ext import engine
from lirpa_ext.engine.positive_list import FAMILIES, PATH

Key = tuple[str, str, str]


def judged(observations: list[Observation]) -> dict[Key, str]:
    """What was wrong with each family, kind and configuration: "" where bounds were attacked and all of them held.

    An error of the engine gives no bound, so it is no reason against the others. A function of each entry is the same
    function in every shape: one violation counts against all of its configurations. Patches depend on the whole chain of
    convolutions that they passed, not on one node: one violation counts against every row of that mode.
    """
    told: dict[Key, list[str]] = {}
    for family, kind, configuration, wrong in observations:
        told.setdefault((family, kind, configuration), []).append(wrong)
    violated = {key: [text for text in texts if text and not text.startswith("error")] for key, texts in told.items()}
    verdicts = {}
    chains = [text for key, texts in violated.items() if "patches" in key[2].split(", ") for text in texts]
    for key, all_of_it in told.items():
        shared = [other for other in told if other[:2] == key[:2]] if key[1] in ACTIVATIONS | FUNCTIONS else [key]
        violations = [wrong for other in shared for wrong in violated[other]]
        violations += chains if "patches" in key[2].split(", ") else []
        verdicts[key] = violations[0] if violations else "" if "" in all_of_it else all_of_it[0]
    return verdicts


def main() -> None:
    """Write the rows of this version of the engine; the other versions' stay."""
    torch.set_num_threads(1)
    observations = []
    cases = catalogue()
    for number, case in enumerate(cases):
        observations += observe(case, number)
        print(f"\r{number + 1}/{len(cases)} {case.subject:40}", end="", flush=True, file=sys.stderr)
    verdicts = judged(observations)
    table = json.loads(PATH.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, list[str]]] = {family: {} for family in FAMILIES}
    for (family, kind, configuration), wrong in sorted(verdicts.items()):
        if wrong:
            print(f"not listed: {family} {kind} [{configuration}]: {wrong}")
        else:
            rows[family].setdefault(kind, []).append(configuration)
    table[engine.engine_version()] = rows
    PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
