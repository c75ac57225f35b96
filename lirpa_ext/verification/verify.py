"""`verify`: decide whether a network has a property, by attacks and by bound methods, the cheapest first."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from ..engine.limits import spare_memory
from ..errors import InvalidInputError
from ..methods import find_method, known_methods
from .verdict import CaseResult, Verdict
from .verifier import Verifier
from .vnnlib import Specification

__all__ = ["METHODS", "CaseResult", "Verdict", "verify"]

METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN", "split")


@torch.inference_mode(False)  # whatever the caller's mode: bounds and attacks need gradients
def verify(
    model: nn.Module,
    specification: Specification,
    *,
    input_shape: tuple[int, ...] | None = None,
    timeout: float | None = None,
    methods: Sequence[str] = METHODS,
    attack: int = 40,
    dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Verify a property of a network, or find a counterexample.

    The first method bounds every case, PGD attacks the cases that are not verified, and the other methods bound those
    for which PGD finds no counterexample. Bounds of different methods on a case are combined row by row. A polytope is
    out of reach if the lower bound of one of its rows is above the row's limit. "split" is a branch and bound for cases
    with at most 12 varying inputs: it halves boxes, and bounds them by CROWN.

    Before a case counts as verified, the bounds of all its rows are compared with the network at the box's center, at
    corners (random ones, and those where the gradient predicts the least values) and at every point of the attack. A
    bound that a point refutes is a defect of its method: all bounds of the method, on all cases, are dropped, and
    ``reasons`` names the method, case, row, bound and value.

    *verified* holds for every real input of the boxes as the file states them, and for the network in real arithmetic
    up to the floating-point rounding of the methods; a few units in the last place are subtracted from each bound, and
    a margin of 0 or NaN verifies nothing. *violated* means that the witness lies exactly in the box, and is unsafe both
    in float64 and as the network runs: in onnxruntime for a network of `lirpa_ext.load_onnx`, else in float32.

    Args:
        model: The network, (B, ...) -> (B, outputs); in eval mode. It is copied, not changed.
        specification: The property, from `lirpa_ext.load_vnnlib`. X numbers the inputs of one sample in C order.
        input_shape: Shape of one sample; default the model's ``input_shape``, else (inputs,).
        timeout: Seconds of wall time, default no limit. The time is checked between torch functions of the search, but
            not while a graph is built.
        methods: Methods of `BoundedModule.compute_bounds`, and "split", the cheapest first; default `METHODS`.
        attack: Steps of PGD, default 40; 0 for no attack.
        dtype: torch.float64 (default) or torch.float32, of the bounds; in float32 a small margin may be due to
            rounding.
        max_memory: Bytes that bounding may take beyond what the process has, default half of the free memory. A method
            that needs more is skipped.
        seed: Seed of the attack, default 0.

    Returns:
        The verdict.

    Raises:
        DataError: Numbers of inputs or outputs of the property and the network differ.
        InvalidInputError: The network fails on an input of that shape, or an argument is out of range.
        UnknownMethodError: A method is unknown.
        OptionError, TrainModeError: A method lacks a required option, or the network is in train mode.

    Example:
        >>> from lirpa_ext import load_vnnlib
        >>> text = '''(declare-const X_0 Real) (declare-const Y_0 Real)
        ... (assert (<= -1 X_0 1)) (assert (<= Y_0 -0.5))'''
        >>> verdict = verify(nn.ReLU(), load_vnnlib(text))
        >>> verdict.status, round(verdict.margin, 6), verdict.method
        ('verified', 0.5, 'IBP')
    """
    start = time.monotonic()
    if timeout is not None and not timeout > 0:
        raise InvalidInputError(f"timeout must be positive, in seconds, got {timeout}")
    if attack < 0 or dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"attack must not be negative, dtype torch.float32 or float64; got {attack}, {dtype}")
    for method in methods:
        if method != "split" and method.lower() not in map(str.lower, known_methods()):
            find_method(method)  # raises
    if max_memory is None:
        max_memory = spare_memory()
    shape = input_shape or getattr(model, "input_shape", None) or (specification.inputs,)
    run = Verifier(
        model, specification, tuple(shape), dtype, list(methods), max_memory, start + (timeout or math.inf), seed
    )
    run.all_methods(attack)
    return run.verdict(time.monotonic() - start)
