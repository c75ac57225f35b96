"""Nodes of this package in the engine's graph, registered through the engine's ``custom_ops``.

`BoundPerturbedInput` follows every input, and makes the engine's l2 bounds sound. `BoundBallBoxRelu` and
`BoundBallBoxLinear` replace the engine's ReLU and linear nodes; without a ball or slopes they compute exactly what the
engine's do. `BoundPowerIteration` holds the persistent power iteration of a weight.
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

# The engine's nodes whose interval arithmetic reads an lp ball, and nodes that pass a ball on unchanged.
_KNOW_THE_BALL = ("BoundLinear", "BoundBallBoxLinear", "BoundConv")
_HAND_ON = ("BoundFlatten", "BoundReshape")


class PerturbedInput(torch.autograd.Function):
    """The identity, which the tracer records as the node ``lirpa_ext::PerturbedInput``."""

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
    """The identity right after an input, which passes the lp ball on as a box to nodes that cannot read a ball.

    The engine gives the input of an l2 ball an interval of width 0 together with the ball, and only linear and
    convolutional nodes read the ball: any other first operation (sub, slice, add, ...) bounds a set of one point. This
    node passes the ball on only if all nodes that read it can do so, else the box around the ball. Backward bounds
    pass through unchanged, and the engine concretizes them with the exact dual norm at the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.as_subclass(torch.Tensor)  # max() of a BoundedTensor would return a plain tuple

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
    """Whether some node reads the value of `node`, and all that do can read an lp ball of this p."""
    users = _users(node)
    return bool(users) and all(_knows_the_ball(user, norm) for user in users)


def _knows_the_ball(node: Any, norm: float) -> bool:
    name = type(node).__name__
    if name in _HAND_ON:
        return _all_read_it(node, norm)
    if name == "BoundConv" and (len(node.output_shape) != 4 or norm != 2):
        return False  # 1-D convolutions of 0.7 read the ball wrongly, and both versions assume p = 2
    return name in _KNOW_THE_BALL and not any(parent.perturbed for parent in node.inputs[1:])


class BoundBallBoxRelu(engine.BoundRelu):  # type: ignore[misc]
    """A ReLU whose backward bound may use a ball besides the box, and given lower slopes.

    Attributes:
        ball: Set of the input (`BallBox`), or None for the engine's own relaxation on the box.
        slope: Lower slopes in [0, 1], of the shape of the input (B, ...), or None for the engine's choice.
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
    """Slopes of the two lines of a ReLU's triangle relaxation on the box.

    Args:
        state: Set of the ReLU's input.
        slope: Lower slopes in [0, 1], (B, ...) or (S, B, ...), read where the box contains 0 inside; default those of
            CROWN, 1 where u + l > 0, else 0.

    Returns:
        Slopes of the upper line, (B, ...), and of the lower line, of the shape of `slope`.
    """
    lower, upper = state.box()
    above, below = upper.clamp(min=0), lower.clamp(max=0)
    line = torch.where(lower >= 0, 1.0, above / (above - below).clamp(min=torch.finfo(upper.dtype).tiny))
    if slope is None:
        slope = (upper + lower > 0).to(upper)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, slope))
    return line, slope


def relu_backward(rows: Tensor, state: BallBox, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Backward bound of a ReLU over a ball and a box.

    For any lam, a.relu(v) >= lam.v + min over the set of (a.relu(v) - lam.v). As in CROWN, lam is a times the slope
    of the lower line where a >= 0, and of the upper line where a < 0.

    Args:
        rows: Coefficient rows a of the ReLU's output, (S, B, ...).
        state: Set of the ReLU's input.
        slope: Lower slopes, as in `relu_slopes`.

    Returns:
        lam, (S, B, ...), and a lower bound on the minimum, (S, B).
    """
    line, slope = relu_slopes(state, slope)
    lam = torch.where(rows >= 0, rows * slope, rows * line)
    bias, _ = relu_ball_box_min(flat_rows(rows), flat_rows(lam), *flat_set(state))
    return lam, bias.t()


def flat_rows(rows: Tensor) -> Tensor:
    """Coefficient rows in the engine's layout, (S, B, ...), as (B, S, n)."""
    return rows.reshape(*rows.shape[:2], -1).transpose(0, 1)


def flat_set(state: BallBox) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Center (B, n), radius (B,), lower and upper corner (B, n) of a set."""
    lower, upper = state.box()
    return flat(state.center), state.radius, flat(lower), flat(upper)


class BoundBallBoxLinear(engine.BoundLinear):  # type: ignore[misc]
    """A linear node whose interval bound is intersected with the image of a ball around its input's center.

    Attributes:
        ball: Set of the input (`BallBox`), or None for the engine's own interval arithmetic.
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
    """A node whose value is a lower estimate, by power iteration, of the spectral norm of a linear node's weight.

    The node reads the weight, and no other node reads its value; bound methods use its `iteration` if
    ``norms="estimate"``. The vector ``iteration.u`` is saved with the module.

    Args:
        weight: Node of the weight.
        iteration: The power iteration.
        linear_map: Weight -> linear map.
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
