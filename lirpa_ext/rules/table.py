"""The table of rules, from the exact name of a node's class to its rule.

Base classes are not searched: a subclass in the engine may compute something else than its base class.
"""

from __future__ import annotations

from collections.abc import Collection

from ..errors import RegistrationError
from ..extensions import add
from .base import SetRule
from .bilinear import Multiplication
from .elementwise import Elementwise, atan, relu, sigmoid, steepest, tanh
from .linear import Affine, batch_norm, conv, conv_transpose, dense, nonnegative
from .maxima import Maximum, axis_windows, pool_windows
from .pairs import Larger
from .products import MatMul
from .quotients import Quotient
from .softmax import LogSoftmax, Softmax
from .structure import (
    Cast,
    Concat,
    Monotone,
    Negation,
    Reshape,
    Sum,
    along_features,
    expand,
    expand_back,
    max_pool_factor,
    one,
    pad,
    same,
    select_back,
    transpose,
    transpose_back,
)

RULES: dict[str, SetRule] = {
    # Linear layers
    "BoundLinear": Affine(dense, weight=1),
    "BoundBallBoxLinear": Affine(dense, weight=1),
    "BoundConv": Affine(conv, by_channel=True, weight=1),
    "BoundConv1d": Affine(conv, by_channel=True, weight=1),
    "BoundConvTranspose": Affine(conv_transpose, by_channel=True, weight=1),
    "BoundAnyConvTranspose": Affine(conv_transpose, by_channel=True, weight=1),
    "BoundBatchNormalization": Affine(batch_norm),
    # Linear maps without negative entries
    "BoundAveragePool": Affine(nonnegative),
    "BoundGlobalAveragePool": Affine(nonnegative),
    "BoundReduceMean": Affine(nonnegative),
    "BoundReduceSum": Affine(nonnegative),
    "BoundCumSum": Affine(nonnegative),
    "BoundGather": Affine(nonnegative),
    "BoundTile": Affine(nonnegative),
    "BoundRepeatingPad": Affine(nonnegative),
    # Sums, products, quotients, the larger of two
    "BoundAdd": Sum(+1),
    "BoundAddByAdjoint": Sum(+1),
    "BoundSub": Sum(-1),
    "BoundSubByAdjoint": Sum(-1),
    "BoundNeg": Negation(),
    "BoundMul": Multiplication(),
    "BoundMulByAdjoint": Multiplication(),
    "BoundDiv": Quotient(),
    "BoundDivByAdjoint": Quotient(),
    "BoundMatMul": MatMul(),
    "BoundMatMulByAdjoint": MatMul(),
    "BoundMax": Larger(),
    "BoundMin": Larger(-1),
    # Nodes that move, copy, join or select values
    "BoundReshape": Reshape(),
    "BoundFlatten": Reshape(),
    "BoundATenUnflatten": Reshape(),
    "BoundSqueeze": Reshape(),
    "BoundUnsqueeze": Reshape(),
    "BoundIdentity": Monotone(one, same),
    "BoundDropout": Monotone(one, same),
    "BoundPerturbedInput": Monotone(one, same),
    "BoundCast": Cast(),
    "BoundSlice": Monotone(along_features, select_back),
    "BoundSplit": Monotone(along_features, select_back),
    "BoundTranspose": Monotone(transpose, transpose_back),
    "BoundExpand": Monotone(expand, expand_back),
    "BoundPad": Monotone(pad, select_back, homogeneous=False),
    "BoundAnyPad": Monotone(pad, select_back, homogeneous=False),
    "BoundConcat": Concat(),
    "BoundMaxPool": Maximum(max_pool_factor, pool_windows),
    "BoundReduceMax": Maximum(along_features, axis_windows),
    "BoundReduceMin": Maximum(along_features, axis_windows, sign=-1),
    # Activations
    "BoundRelu": Elementwise(relu, exact=True),
    "BoundBallBoxRelu": Elementwise(relu, exact=True),
    "BoundLeakyRelu": Elementwise(relu),
    "BoundSigmoid": Elementwise(sigmoid, span=(0.0, 1.0)),
    "BoundTanh": Elementwise(tanh, span=(-1.0, 1.0)),
    "BoundAtan": Elementwise(atan),
    "BoundHardTanh": Elementwise(steepest, exact=True),
    "BoundClip": Elementwise(steepest, exact=True),
    "BoundPRelu": Elementwise.of_function(),
    "BoundElu": Elementwise.of_function(),
    "BoundErf": Elementwise.of_function(),
    "BoundStableSoftplus": Elementwise.of_function(),
    "BoundHardSigmoid": Elementwise.of_function(),
    "BoundHardSwish": Elementwise.of_function(),
    "BoundExactGelu": Elementwise.of_function(),
    "BoundTanhGelu": Elementwise.of_function(),
    "BoundSilu": Elementwise.of_function(),
    "BoundMish": Elementwise.of_function(),
    "BoundStableSoftmax": Softmax(),
    "BoundStableLogSoftmax": LogSoftmax(),
    # Functions of one number
    "BoundAbs": Elementwise.of_function(exact=True),
    "BoundPow": Elementwise.of_function(),
    "BoundPower": Elementwise.of_function(),
    "BoundSqr": Elementwise.of_function(),
    "BoundSqrt": Elementwise.of_function(),
    "BoundRoot": Elementwise.of_function(),
    "BoundReciprocal": Elementwise.of_function(),
    "BoundExp": Elementwise.of_function(),
    "BoundExponential": Elementwise.of_function(),
    "BoundLog": Elementwise.of_function(),
    "BoundLogarithm": Elementwise.of_function(),
    "BoundSin": Elementwise.of_function(),
    "BoundSine": Elementwise.of_function(),
    "BoundCos": Elementwise.of_function(),
    "BoundCosine": Elementwise.of_function(),
    "BoundTan": Elementwise.of_function(),
    "BoundTangent": Elementwise.of_function(),
}

# Classes of nodes in one version of the engine alone: classes of 0.7.x, and repaired classes for 0.3.
ONE_VERSION = frozenset({
    "BoundATenUnflatten", "BoundHardTanh", "BoundMax", "BoundMin", "BoundReduceMin",
    "BoundAddByAdjoint", "BoundSubByAdjoint", "BoundMulByAdjoint", "BoundDivByAdjoint",
})  # fmt: skip


def check_table(known: Collection[str]) -> None:
    """Raise RegistrationError if a key of the table is not the name of a class of nodes, as by a typing error.

    Args:
        known: Names of all classes of nodes, of the engine and of this package.
    """
    unknown = sorted(set(RULES) - set(known) - ONE_VERSION)
    if unknown:
        raise RegistrationError(f"the table of rules has kinds that are no class of nodes: {', '.join(unknown)}")


def register_rule(kind: str, rule: SetRule, overwrite: bool = False) -> None:
    """Add a rule for a class of nodes.

    Args:
        kind: Exact name of the class, e.g. ``"BoundRelu"``.
        rule: The rule.
        overwrite: Replace an existing rule. Default False.

    Raises:
        RegistrationError: There is a rule for that class already, or `rule` is not an instance of `SetRule`.
    """
    if not isinstance(rule, SetRule):
        raise RegistrationError(f"rule for {kind} is {rule!r}, not an instance of lirpa_ext.rules.SetRule")
    add(RULES, "rule for", kind, rule, overwrite)
