"""``lirpa-ext verify``: verify a property of a network, both from files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..importer import load_onnx
from ..reporting.files import write_whole
from ..verification.verify import METHODS, Verdict, verify
from ..verification.vnnlib import load_vnnlib

STATUS = {"verified": 0, "violated": 1, "unknown": 3}  # 2 is an error
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MOST_SHOWN = 16  # numbers of a witness


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext verify``."""
    parser.set_defaults(run=_verify)
    parser.epilog = "exit status: 0 verified, 1 violated, 3 unknown, 2 error"
    parser.add_argument("model", help="a .onnx or .onnx.gz file")
    parser.add_argument("property", help="a .vnnlib or .vnnlib.gz file (VNN-LIB 1.0)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="default none")
    parser.add_argument(
        "--method", action="append", metavar="NAME", help=f"repeatable, in this order; default {', '.join(METHODS)}"
    )
    parser.add_argument("--attack-steps", type=int, default=40, help="of PGD; 0 for no attack")
    parser.add_argument("--max-memory", type=float, metavar="GIB", help="for bounding; default half of what is free")
    parser.add_argument("--dtype", choices=_DTYPES, default="float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict there, with the whole witness")


def _verify(arguments: argparse.Namespace) -> int:
    specification = load_vnnlib(Path(arguments.property))
    verdict = verify(
        load_onnx(arguments.model, timeout=arguments.timeout), specification,
        timeout=arguments.timeout, methods=arguments.method or METHODS,
        attack=arguments.attack_steps, dtype=_DTYPES[arguments.dtype], seed=arguments.seed,
        max_memory=None if arguments.max_memory is None else int(arguments.max_memory * 2**30),
    )  # fmt: skip
    print(_text(verdict))
    if arguments.json:
        report = {"model": arguments.model, "property": arguments.property, **verdict.to_dict()}
        write_whole(arguments.json, json.dumps(report, indent=1) + "\n")
    return STATUS[verdict.status]


def _text(verdict: Verdict) -> str:
    method = f", by {verdict.method}" if verdict.method else ""
    lines = [f"{verdict.status}: margin {verdict.margin:.6g}, {verdict.seconds:.1f} s{method}"]
    lines += [f"  {reason}" for reason in verdict.reasons]
    if verdict.witness is not None:
        for name, values in (("X", verdict.witness.input.reshape(-1)), ("Y", verdict.witness.output)):
            more = " ..." if len(values) > _MOST_SHOWN else ""
            lines.append(f"  {name} = {' '.join(f'{value:.9g}' for value in values[:_MOST_SHOWN])}{more}")
    return "\n".join(lines)
