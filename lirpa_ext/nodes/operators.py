"""Operators of the package in the engine's graph, registered through the engine's `custom_ops`.

`BoundPerturbedInput` stands right after every input and closes the engine's l2 hole. `BoundBallBoxRelu` and
`BoundBallBoxLinear` take the place of the engine's ReLU and linear nodes; without a ball or slopes they behave
exactly as those do. `BoundPowerIteration` holds the persistent power iteration of a weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox, per_sample
from ..domain.ball_box_min import relu_ball_box_min
from ..domain.lengths import flat, length
from ..domain.norms import NormEstimate, PowerIteration
from ..domain.perturbation import PerturbationLpNorm

# Nodes whose own interval rule knows an lp ball, and those that hand it on unchanged.
_KNOW_THE_BALL = ("BoundLinear", "BoundBallBoxLinear", "BoundConv")
_HAND_ON = ("BoundFlatten", "BoundReshape")


class PerturbedInput(torch.autograd.Function):
    """Identity that the tracer records as the node ``lirpa_ext::PerturbedInput``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad

    @staticmethod
    def symbolic(graph: Any, x: Any) -> Any:
        return graph.op("lirpa_ext::PerturbedInput", x).setType(x.type())


class BoundPerturbedInput(engine.Bound):  # type: ignore[misc]
    """Identity right after an input, which turns the lp ball into a box for whoever does not know balls.

    The engine gives the input of an l2 ball an interval of width 0 together with the ball, and only a linear or
    convolutional node reads the ball: any other first op (sub, slice, add, ...) bounds a set of one point. Here
    the ball is handed on only if all consumers read it, else the box around it. Backward bounds pass through
    unchanged, and the engine concretizes them with the exact dual norm at the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.as_subclass(torch.Tensor)  # not a BoundedTensor, whose max() is a plain tuple

    def interval_propagate(self, *v: Any) -> Any:
        root = self.inputs[0]
        perturbation = root.perturbation
        if perturbation is not None and perturbation.norm != math.inf and self._all_know_the_ball(perturbation):
            return engine.Interval(root.value, root.value, ptb=perturbation)
        return v[0][0], v[0][1]

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        return [(last_lA, last_uA)], 0, 0

    def bound_forward(self, dim_in: int, x: Any) -> Any:
        return x

    def bound_dynamic_forward(self, x: Any, **kwargs: Any) -> Any:
        return x

    def _all_know_the_ball(self, perturbation: PerturbationLpNorm) -> bool:
        scalar = torch.as_tensor(perturbation.radius).numel() == 1
        uncut = perturbation.range_lower is None and perturbation.range_upper is None
        return scalar and uncut and _all_read_it(self, float(perturbation.norm))


def _users(node: Any) -> list[Any]:
    return node.users if hasattr(node, "users") else []


def _all_read_it(node: Any, norm: float) -> bool:
    """Whether somebody reads a node's value, and all who do know an lp ball of this p."""
    users = _users(node)
    return bool(users) and all(_knows_the_ball(user, norm) for user in users)


def _knows_the_ball(node: Any, norm: float) -> bool:
    name = type(node).__name__
    if name in _HAND_ON:
        return _all_read_it(node, norm)
    if name == "BoundConv" and (len(node.output_shape) != 4 or norm != 2):
        return False  # 0.7's 1-D convolution reads the ball wrongly, and both take every ball for one of p = 2
    return name in _KNOW_THE_BALL and not any(parent.perturbed for parent in node.inputs[1:])


class BoundBallBoxRelu(engine.BoundRelu):  # type: ignore[misc]
    """ReLU whose backward bound may use a ball besides the box, and explicit lower slopes.

    Attributes:
        ball: Set of the input (`BallBox`), or None for the engine's own relaxation on the box.
        slope: Lower slopes in [0, 1] of the shape of the input (B, ...), or None for the engine's choice.
    """

    ball: BallBox | None = None
    slope: Tensor | None = None

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if self.ball is None:
            return super().bound_backward(last_lA, last_uA, *x, **kwargs)
        lower: Any = (None, 0) if last_lA is None else relu_backward(last_lA, self.ball, self.slope)
        upper: Any = (None, 0)
        if last_uA is not None:  # max of a.relu(v) is -min of (-a).relu(v)
            lam, bias = relu_backward(-last_uA, self.ball, self.slope)
            upper = -lam, -bias
        return [(lower[0], upper[0])], lower[1], upper[1]

    def _backward_relaxation(self, *args: Any, **kwargs: Any) -> Any:
        relaxation = super()._backward_relaxation(*args, **kwargs)
        if self.slope is None:
            return relaxation
        parent = self.inputs[0]
        slope = torch.where(parent.lower >= 0, 1.0, torch.where(parent.upper <= 0, 0.0, self.slope))
        return (*relaxation[:2], slope.to(self.slope).unsqueeze(0), *relaxation[3:])


def relu_slopes(state: BallBox, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slopes (upper, lower) of the triangle relaxation on the box; CROWN's adaptive lower ones by default."""
    lower, upper = state.box()
    above, below = upper.clamp(min=0), lower.clamp(max=0)
    line = torch.where(lower >= 0, 1.0, above / (above - below).clamp(min=torch.finfo(upper.dtype).tiny))
    if slope is None:
        slope = (upper + lower > 0).to(upper)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, slope))
    return line, slope


def relu_backward(rows: Tensor, state: BallBox, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Backward bound of a ReLU over a ball and a box (DESIGN.md 4b).

    For any lam, a.relu(v) >= lam.v + min over the set of (a.relu(v) - lam.v); here lam = slope * a, CROWN's.

    Args:
        rows: Coefficients a of the ReLU's output, (S, B, ...).
        state: Set of the ReLU's input.
        slope: Lower slopes, (B, ...) or (S, B, ...); default CROWN's adaptive ones.

    Returns:
        lam, (S, B, ...), and the minimum, (S, B).
    """
    line, slope = relu_slopes(state, slope)
    lam = torch.where(rows >= 0, rows * slope, rows * line)
    bias, _ = relu_ball_box_min(flat_rows(rows), flat_rows(lam), *flat_set(state))
    return lam, bias.t()


def flat_rows(rows: Tensor) -> Tensor:
    """Rows of the engine's layout, (S, B, ...), as (B, S, n)."""
    return rows.reshape(*rows.shape[:2], -1).transpose(0, 1)


def flat_set(state: BallBox) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Center (B, n), radius (B,), lower and upper corner (B, n) of a set."""
    lower, upper = state.box()
    return flat(state.center), state.radius, flat(lower), flat(upper)


class BoundBallBoxLinear(engine.BoundLinear):  # type: ignore[misc]
    """Linear node whose interval bound is cut with the image of a ball around its input's center.

    Attributes:
        ball: Set of the input (`BallBox`), or None for the engine's own interval rule.
    """

    ball: BallBox | None = None

    def interval_propagate(self, *v: Any, C: Tensor | None = None, **kwargs: Any) -> Any:
        extra = {} if C is None else {"C": C}
        lower, upper = super().interval_propagate(*v, **extra, **kwargs)
        if self.ball is None or C is not None:
            return lower, upper
        constants = [interval[0] for interval in v[1:]]
        weight = constants[0] if self.transB else constants[0].t()
        center = self.forward(self.ball.center, *constants)
        reach = length(weight) * per_sample(self.ball.radius, center)
        return torch.maximum(lower, center - reach), torch.minimum(upper, center + reach)


class BoundPowerIteration(engine.Bound):  # type: ignore[misc]
    """Lipschitz power-iteration node: an estimate (from below) of the spectral norm of a linear node's weight.

    It hangs on the weight and feeds nothing: its value is read by `method="lipschitz"` and `"bcp"` with
    ``norms="estimate"``. Its state `iteration.u` is saved with the module.
    """

    def __init__(self, weight: Any, iteration: PowerIteration, linear_map: Any) -> None:
        super().__init__({}, [weight], 0, {})
        self.iteration = iteration
        self.build_map = linear_map

    def forward(self, weight: Tensor) -> Tensor:
        estimate: NormEstimate = self.iteration(self.build_map(weight), 0)
        return estimate.value


OPS: dict[str, Any] = {
    "lirpa_ext::PerturbedInput": BoundPerturbedInput,
    "onnx::Relu": BoundBallBoxRelu,
    "onnx::Gemm": BoundBallBoxLinear,
}
