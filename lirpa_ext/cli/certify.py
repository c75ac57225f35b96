"""``lirpa-ext certify``: certify a model on a data set, both from files."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import ATTACKS, Attack, make_attack
from ..certification.certify import certify
from ..data import SOURCES, load_data
from ..errors import DataError
from ..methods import known_methods
from ..models.loading import load_model
from ..models.preprocessing import LAYOUTS, preprocessed

DATA_RANGE = 'default 0,1; "none" for no range'
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_certify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext certify``."""
    parser.set_defaults(run=_certify)
    model = add_model(parser)
    model.add_argument("model", help="a .onnx file, a checkpoint of lirpa_ext.models.save_model, or a state dict")
    data = add_data(parser)
    data.add_argument("--data", required=True, help=SOURCES)
    data.add_argument("--data-range", type=numbers, default=[0.0, 1.0], metavar="LO,HI", help=DATA_RANGE)
    task = parser.add_argument_group("certification")
    task.add_argument("--norm", type=float, default=2.0, help="1 to inf, default 2")
    task.add_argument("--eps", type=numbers, required=True, help="one or more, in units of the raw input: 0.5,1.0,1.58")
    task.add_argument("--method", default="bcp", help=f"default bcp; {', '.join(known_methods())}")
    task.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method; repeatable")
    task.add_argument(
        "--radius",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="certified radius of each sample",
    )
    task.add_argument("--radius-tolerance", type=float, default=1e-3)
    task.add_argument("--attack", default="apgd", metavar="NAME", help=f"default apgd; {', '.join(ATTACKS)}, none")
    task.add_argument("--attack-steps", type=int, default=20, help="of a run of the attack; 0 for none")
    task.add_argument("--attack-restarts", type=int, default=2, help="its runs, on cross-entropy and margin in turn")
    task.add_argument("--dtype", choices=_DTYPES, default="float64")
    task.add_argument("--batch-size", type=int, default=64)
    task.add_argument("--device", help="default cpu")
    task.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="results.jsonl (resumed), report.json, .csv and .png")
    output.add_argument("--no-resume", action="store_true", help="put an existing results.jsonl aside")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model(parser: argparse.ArgumentParser) -> Any:
    """Add the arguments for reading and preprocessing a model, without the file, and return their group."""
    model = parser.add_argument_group("model")
    model.add_argument("--arch", metavar="MODULE:CALLABLE", help="builds the model of a state dict")
    model.add_argument("--trust", action="store_true", help="unpickle whatever the file holds; it can run any code")
    model.add_argument("--mean", type=numbers, help="per-channel mean, put inside of the model: 0.49,0.48,0.45")
    model.add_argument("--std", type=numbers, help="per-channel standard deviation, likewise")
    model.add_argument("--scale", type=float, default=1.0, help="first multiplied by this: 255 for a network of bytes")
    model.add_argument("--layout", choices=LAYOUTS, default="auto", help="where the network has channels")
    return model


def add_data(parser: argparse.ArgumentParser) -> Any:
    """Add the arguments for the part of a data set, without the set and its range, and return their group."""
    data = parser.add_argument_group("data")
    data.add_argument("--split", choices=("test", "train"), default="test")
    data.add_argument("--limit", type=int, metavar="N", help="the first N samples only")
    return data


def read_model(path: str | Path, arguments: argparse.Namespace) -> nn.Module:
    """Load a model from a file, by the arguments of `add_model`, without its preprocessing (see `prepare`).

    Args:
        path: The file.
        arguments: Parsed arguments.

    Raises:
        DataError: As `lirpa_ext.models.loading.load_model`.
    """
    sys.path.insert(0, os.getcwd())  # so that --arch finds modules in the current folder, as with python -m
    try:
        return load_model(path, arguments.arch, arguments.trust)
    finally:
        sys.path.remove(os.getcwd())


def prepare(model: nn.Module, shape: Sequence[int], arguments: argparse.Namespace) -> nn.Module:
    """Put normalization, scale and layout of the arguments of `add_model` before a model.

    Args:
        model: The model.
        shape: Shape of one raw sample.
        arguments: Parsed arguments.

    Raises:
        DataError: As `lirpa_ext.models.preprocessing.Preprocessed`.
    """
    return preprocessed(model, shape, arguments.mean, arguments.std, arguments.scale, arguments.layout)


def _certify(arguments: argparse.Namespace) -> int:
    if len(arguments.data_range) not in (0, 2):
        raise DataError(f"--data-range takes LO,HI or none, got {arguments.data_range}")
    model = read_model(arguments.model, arguments)
    x, y = load_data(arguments.data, arguments.split, arguments.limit)
    model = prepare(model, x.shape[1:], arguments)
    x_L, x_U = arguments.data_range or (None, None)
    report = certify(
        model, (x, y), arguments.eps, arguments.norm, arguments.method,
        options=options_of(arguments.option), x_L=x_L, x_U=x_U, dtype=_DTYPES[arguments.dtype],
        batch_size=arguments.batch_size, attack=_attack(arguments),
        radius=arguments.radius and arguments.radius_tolerance,
        results=arguments.out and arguments.out / "results.jsonl", resume=not arguments.no_resume,
        progress=not arguments.quiet, device=arguments.device, seed=arguments.seed,
    )  # fmt: skip
    print(
        f"{arguments.model}: {len(report.records)} samples, method {arguments.method}, "
        f"norm {arguments.norm:g}, {arguments.dtype}, data range {[x_L, x_U]}"
    )
    print(report.table())
    if report.meta.get("fallbacks"):
        print(f"bounded by the engine's interval rule: {json.dumps(report.meta['fallbacks'])}")
    if arguments.out:
        report.to_json(arguments.out / "report.json")
        report.to_csv(arguments.out / "report.csv")
        report.plot(arguments.out / "report.png")
        print(f"written to {arguments.out}")
    return 0


def _attack(arguments: argparse.Namespace) -> Attack | None:
    if arguments.attack == "none" or not arguments.attack_steps:
        return None
    return make_attack(arguments.attack, steps=arguments.attack_steps, restarts=arguments.attack_restarts)


def numbers(text: str) -> list[float]:
    """Parse comma-separated numbers; an empty list for "none"."""
    return [] if text == "none" else [float(part) for part in text.split(",")]


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs into a dict; a value that is no Python literal stays a string.

    Raises:
        DataError: A pair has no "=" or no key.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise DataError(f"--option takes KEY=VALUE, got {pair!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # no literal
            options[key] = value
    return options
