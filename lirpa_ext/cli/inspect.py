"""``lirpa-ext inspect``: show the content of an ONNX file, and which methods can bound it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..importer.inspection import METHODS, Inspection, Trial, inspect_onnx
from ..reporting.files import write_whole


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lirpa-ext inspect``."""
    parser.set_defaults(run=_inspect)
    parser.epilog = "exit status: 0 imported, 1 refused, 2 error"
    parser.add_argument("model", help="a .onnx or .onnx.gz file")
    parser.add_argument("--nodes", action="store_true", help="list every node with its shape")
    parser.add_argument(
        "--method", action="append", metavar="NAME", help=f"to be tried; repeatable; default {', '.join(METHODS)}"
    )
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="for each method; default 30")
    parser.add_argument("--input", help="the input that varies, where there are several")
    parser.add_argument("--output", help="the output, where there are several")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there")


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect_onnx(
        arguments.model, arguments.method or METHODS, timeout=arguments.timeout, input=arguments.input,
        output=arguments.output,
    )  # fmt: skip
    print(_text(found, arguments.nodes))
    if arguments.json:
        write_whole(arguments.json, json.dumps({"file": arguments.model, **found.to_dict()}, indent=1) + "\n")
    return 0 if found.model is not None else 1


def _text(found: Inspection, nodes: bool) -> str:
    lines = [
        f"opset {found.opset}, by {found.producer or 'an unknown exporter'}, {found.parameters} weights",
        f"inputs: {_shapes(found.inputs)}; outputs: {_shapes(found.outputs)}",
        f"ops: {', '.join(f'{count} {op}' for op, count in found.ops.items())}",
    ]
    if nodes:
        lines += [
            f"  {op:24s} {_shape(shape) if shape is not None else '?':20s} {name}" for op, name, shape in found.nodes
        ]
    if found.model is None:
        return "\n".join([*lines, f"refused: {found.refusal}"])
    model, check = found.model, found.model.check
    batch = "any batch size" if model.batch_size is None else "one sample at a time"
    lines += [
        f"imported: {_shape(model.input_shape)} -> {_shape(model.output_shape)}, layout {model.layout}, {batch}",
        *[f"  rewritten: {note}" for note in model.rewrites],
        f"checked on {check.inputs} inputs at batch {', '.join(map(str, check.batch_sizes))}: torch differs from "
        f"onnxruntime by {check.torch_error:.1e} of the largest output, the engine by {check.engine_error:.1e}",
    ]
    lines += [_trial(trial) for trial in found.trials]
    fallbacks = {kind for trial in found.trials for kind in trial.fallbacks.values()}
    if fallbacks:
        lines.append(f"bounded by interval arithmetic in bcp, for want of a rule: {', '.join(sorted(fallbacks))}")
    return "\n".join(lines)


def _trial(trial: Trial) -> str:
    outcome = f"bounds in {trial.seconds:.2f} s" if trial.bounded else f"no: {trial.reason}"
    return f"  {trial.method:12s} l{trial.norm:<4g} {outcome}"


def _shapes(shapes: dict[str, tuple[int | None, ...]]) -> str:
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in shapes.items())


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
