"""`verify`: does a network have a property? Attack, then bound by one method after the other, the cheapest first."""

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

    The first method bounds every case; what it leaves open is attacked by PGD; what that does not break goes through
    the other methods. Bounds of different methods on the same case are combined, row by row. A polytope that is a
    conjunction of rows is out of reach if one row is. "split" halves the boxes of cases with at most 12 inputs that
    vary, bounding them by CROWN.

    Before a case is settled, the bounds of all its rows are held against the network at the box's center, at corners
    (random ones, and those where the gradients take the rows for the least) and at every point that the attack visited.
    A bound that a point refutes is a defect of its method: all bounds of that method are dropped, those of other cases
    and earlier ones too, and `reasons` has the method, case, row, bound and value.

    *verified* holds for every real input of the boxes as the file states them, and for the network in real arithmetic
    up to what the methods' own floating-point rounding loses; a few units in the last place are taken off each bound,
    and a margin of 0 or NaN verifies nothing. *violated* means that the witness lies in the box exactly, and is unsafe
    both in float64 and as the network runs: in onnxruntime for one of `lirpa_ext.load_onnx`, else in float32.

    Args:
        model: The network, (B, ...) -> (B, outputs); in eval mode. It is copied, not changed.
        specification: From `lirpa_ext.load_vnnlib`. X counts the inputs of one sample in C order.
        input_shape: Shape of one sample; default the model's `input_shape`, else (inputs,).
        timeout: Seconds of wall time, default no limit. It is looked at between any two torch functions of the
            search, not while a graph is built.
        methods: Of `BoundedModule.compute_bounds`, and "split"; the cheapest first.
        attack: Steps of PGD, default 40; 0 for no attack.
        dtype: Of the bounds: torch.float64, or torch.float32, in whose rounding a small margin means little.
        max_memory: Bytes that bounding may take beyond what the process has, default half of what is free. A method
            that asks for more is left for the next one.
        seed: Of the attack.

    Returns:
        The verdict.

    Raises:
        DataError: Numbers of inputs or outputs of property and network differ.
        InvalidInputError: The network fails on an input of that shape, or an argument is out of range.
        UnknownMethodError: There is no such method.
        OptionError, TrainModeError: A method needs an option, or the network another mode.

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
