"""Mode connectivity (C.5): is there a path of low certified loss between two trained models?

The path is a quadratic Bezier curve whose ends are the two models' weights; its middle point is trained. T. Garipov et
al., Loss surfaces, mode connectivity, and fast ensembling of DNNs, NeurIPS 2018; the barrier is that of P. Zhao et
al., Bridging mode connectivity in loss landscapes and adversarial robustness, ICLR 2020.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..module.bounded_module import BoundedModule
from ..reporting.plots import figure, style
from ..reporting.results import Result, Row
from ..training.objectives import Loss, Step, step_loss
from ..training.schedules import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CertifiedObjective", "Connectivity", "bezier", "connect", "plot_connectivity"]

Weights = dict[str, Tensor]
ModelLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def bezier(start: Tensor, middle: Tensor, end: Tensor, t: float) -> Tensor:
    """(1 - t)^2 start + 2 t (1 - t) middle + t^2 end; exactly `start` at 0 and `end` at 1.

    Args:
        start: Any shape.
        middle: The same.
        end: The same.
        t: In [0, 1].

    Example:
        >>> bezier(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(2.0), 0.5)
        tensor(2.2500)
    """
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


@dataclass
class CertifiedObjective:
    """A certified loss as a function of a model, its inputs and labels, for `connect`.

    Args:
        loss: Which, by the names of `lirpa_ext.training.OBJECTIVES`. Where training takes estimated norms, this takes
            sound ones, which are a function of the weights.
        eps: Radius, in units of the input.
        norm: p of the ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        kappa: Weight of the natural loss, default 0.
        beta: Weight of the method's bound against IBP's, default 1.
        seed: Of what the loss draws, the same in each call; default 0.

    Raises:
        ConfigError: The loss is unknown.
    """

    loss: Loss
    eps: float
    norm: float = 2
    x_L: float | None = None
    x_U: float | None = None
    kappa: float = 0.0
    beta: float = 1.0
    seed: int = 0
    _graph: tuple[nn.Module, torch.Size, BoundedModule] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.loss.check()
        if self.loss.objective.estimate:
            options = {"norms": "bound"} | self.loss.options
            self.loss = Loss(self.loss.name, options, self.loss.fused, self.loss.stability, self.loss.attack_steps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch, 0-dim, differentiable in the model's parameters.

        Args:
            model: In eval mode.
            x: (B, ...).
            y: Labels, (B,).
        """
        if self._graph is None or self._graph[0] is not model or self._graph[1] != x.shape:
            self._graph = (model, x.shape, BoundedModule(model, x))
        values = Values(self.eps, self.kappa, self.beta)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            step = Step(self._graph[2], x, y, None, values, self.norm, self.x_L, self.x_U)
            return step_loss(self.loss, step)


@dataclass(frozen=True)
class Connectivity(Result):
    """Losses along a trained curve, and along the straight line that it began as.

    Attributes:
        t: Points of the curve, from 0 to 1.
        curve: Loss at each.
        line: Loss on the straight line between the ends.
        name: Of the loss.
        ends: Names of the two models.
        middle: Weights of the trained middle point.
    """

    t: tuple[float, ...]
    curve: tuple[float, ...]
    line: tuple[float, ...]
    name: str = "loss"
    ends: tuple[str, str] = ("first", "second")
    middle: Weights = field(default_factory=dict, repr=False, compare=False)

    @property
    def barrier(self) -> float:
        """Highest loss of the curve less the higher one of its ends; 0 where an end is the highest, NaN beats all."""
        return _height(self.curve)

    @property
    def line_barrier(self) -> float:
        """The same of the straight line."""
        return _height(self.line)

    @property
    def connected(self) -> bool:
        """Whether no barrier was found: no point above both ends by more than the rounding of float32 losses."""
        top = max(abs(self.curve[0]), abs(self.curve[-1]))
        return self.barrier <= 1e-5 * max(top, 1e-3)  # False for NaN

    def rows(self) -> list[Row]:
        """One row a point."""
        return [{"t": t, "curve": a, "line": b} for t, a, b in zip(self.t, self.curve, self.line, strict=True)]

    def summary(self) -> str:
        """Barrier found or not, and how high."""
        first, second = self.ends
        found = "no barrier" if self.connected else f"a barrier of height {self.barrier:.4g}"
        return (
            f"{self.name} from {first} ({self.curve[0]:.4g}) to {second} ({self.curve[-1]:.4g}): {found} on the curve, "
            f"whose losses are {min(self.curve):.4g} to {max(self.curve):.4g} at {len(self.t)} points; the straight "
            f"line rises {self.line_barrier:.4g} above its ends."
        )


def _height(losses: Sequence[float]) -> float:
    return math.nan if any(math.isnan(loss) for loss in losses) else max(losses) - max(losses[0], losses[-1])


def connect(
    first: nn.Module,
    second: nn.Module,
    loss: ModelLoss,
    data: tuple[Tensor, Tensor],
    *,
    steps: int = 300,
    lr: float = 1e-2,
    batch_size: int = 100,
    points: int = 21,
    seed: int = 0,
    name: str = "loss",
    ends: tuple[str, str] = ("first", "second"),
) -> Connectivity:
    """Train the middle point of a Bezier curve between two models, and evaluate the loss along it.

    Minimizes E over t in U[0, 1] of loss(phi(t)), with phi the curve and one t a step, by Adam with a cosine schedule
    from the middle of the straight line. The gradient for the middle point is 2 t (1 - t) times that at phi(t). That
    a barrier was found says that this training found no path without one, not that there is none.

    Args:
        first: Model at t = 0. Neither model is changed; their copies are in eval mode.
        second: Model at t = 1, of the same architecture.
        loss: ``loss(model, x, y)`` -> 0-dim mean, such as a `CertifiedObjective`.
        data: Images (N, ...) and labels (N,), for training and, in the same order, for evaluation.
        steps: Of Adam, default 300; 0 leaves the straight line.
        lr: Its learning rate at first, default 0.01.
        batch_size: Default 100; of training and of evaluation. Samples beyond a multiple are left out of both.
        points: Points of the curve to evaluate, ends included, default 21.
        seed: Of order and t.
        name: Of the loss, for plot and summary.
        ends: Names of the models.

    Returns:
        Losses along curve and line.

    Raises:
        InvalidInputError: The models have other parameters than each other, or buffers that differ: statistics of a
            batch norm hold for one point of the curve only. Or a number is out of range.

    Example:
        >>> a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> a.weight.data.fill_(-1.0), b.weight.data.fill_(1.0)
        (tensor([[-1.]]), tensor([[1.]]))
        >>> data = torch.ones(4, 1), torch.zeros(4)
        >>> found = connect(a, b, lambda model, x, y: (model(x) ** 2 - 1).square().mean(), data, batch_size=4)
        >>> found.line_barrier, found.connected  # in one dimension, each path leads through 0
        (1.0, False)
    """
    x, y = data
    count = len(x) // max(batch_size, 1)
    if steps < 0 or points < 2 or batch_size < 1 or count < 1 or not 0 < lr < math.inf:
        raise InvalidInputError(
            f"connect takes steps of 0 or more, 2 or more points, a positive lr and at least one batch of samples; got "
            f"{steps}, {points}, {lr} and {len(x)} samples for batches of {batch_size}"
        )
    model = copy.deepcopy(first).eval()
    start, end = _compatible(first, second)
    middle = {key: (start[key] + end[key]) / 2 for key in start}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(middle.values(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    parameters = dict(model.named_parameters())
    variables = [parameters[key].requires_grad_() for key in middle]
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        t = float(torch.rand((), generator=generator))
        _place(model, {key: bezier(start[key], middle[key], end[key], t) for key in middle})
        found = torch.autograd.grad(loss(model, x[chosen], y[chosen]), variables, allow_unused=True)
        for value, gradient in zip(middle.values(), found, strict=True):
            value.grad = None if gradient is None else 2 * t * (1 - t) * gradient
        optimizer.step()
        schedule.step()
    batches = [(x[k * batch_size :][:batch_size], y[k * batch_size :][:batch_size]) for k in range(count)]
    times = [k / (points - 1) for k in range(points)]
    straight = {key: (start[key] + end[key]) / 2 for key in start}
    curve, line = (
        tuple(
            _mean_loss(model, {k: bezier(start[k], through[k], end[k], t) for k in through}, loss, batches)
            for t in times
        )
        for through in (middle, straight)
    )
    return Connectivity(tuple(times), curve, line, name, ends, middle)


def _compatible(first: nn.Module, second: nn.Module) -> tuple[Weights, Weights]:
    """Detached parameters of both."""
    start, end = ({k: v.detach().clone() for k, v in model.named_parameters()} for model in (first, second))
    shapes = [{k: tuple(v.shape) for k, v in weights.items()} for weights in (start, end)]
    if shapes[0] != shapes[1]:
        different = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise InvalidInputError(f"a curve leads between models of the same parameters; these differ in {different[:4]}")
    buffers = dict(second.named_buffers())
    for key, value in first.named_buffers():
        if key not in buffers or not torch.equal(value, buffers[key]):
            raise InvalidInputError(
                f"buffer {key!r} of the two models differs, and a curve of weights has none of its own: statistics of "
                "batch norms would have to be taken anew at each point. Connect models without"
            )
    return start, end


@torch.no_grad()
def _place(model: nn.Module, weights: Weights) -> None:
    for key, parameter in model.named_parameters():
        parameter.copy_(weights[key])


@torch.no_grad()
def _mean_loss(model: nn.Module, weights: Weights, loss: ModelLoss, batches: Sequence[tuple[Any, Any]]) -> float:
    _place(model, weights)
    return float(torch.stack([loss(model, x, y).double() for x, y in batches]).mean())


def plot_connectivity(found: Sequence[Connectivity]) -> Figure:
    """Loss along each curve and, dotted, along its straight line, as Fig. C.3 to C.5.

    Args:
        found: One or several, such as one pair of models under two losses.
    """
    drawn, axes = figure("Loss along curves of weights between two models. " + " ".join(c.summary() for c in found))
    for number, each in enumerate(found):
        look = style(number)
        verdict = "no barrier" if each.connected else f"barrier {each.barrier:.3g}"
        axes[0, 0].plot(each.t, each.curve, label=f"{each.name}: {verdict}", **look)
        axes[0, 0].plot(each.t, each.line, color=look["color"], linestyle=":", linewidth=1)
    first, second = found[0].ends
    axes[0, 0].set(xlabel=f"t on the curve, from {first} to {second}", ylabel="loss (dotted: straight line)")
    axes[0, 0].legend()
    return drawn
