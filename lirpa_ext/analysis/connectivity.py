"""Mode connectivity (Lee, 2021, C.5): search for a path of low certified loss between two trained models.

The path is a quadratic Bezier curve whose ends are the weights of the two models, and whose middle point is trained:
T. Garipov et al., Loss surfaces, mode connectivity, and fast ensembling of DNNs, NeurIPS 2018. The barrier is defined
by P. Zhao et al., Bridging mode connectivity in loss landscapes and adversarial robustness, ICLR 2020.
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
    """Point of a quadratic Bezier curve, (1 - t)^2 start + 2 t (1 - t) middle + t^2 end.

    Args:
        start: Point at t = 0, any shape.
        middle: Middle control point, of the shape of `start`.
        end: Point at t = 1, of the shape of `start`.
        t: Position on the curve, in [0, 1].

    Returns:
        The point, of the shape of `start`; exactly `start` at 0 and `end` at 1.

    Example:
        >>> bezier(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(2.0), 0.5)
        tensor(2.2500)
    """
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


@dataclass
class CertifiedObjective:
    """A certified loss as a function of model, inputs and labels, for `connect`.

    Args:
        loss: The loss, by a name of `lirpa_ext.training.OBJECTIVES`. Estimated norms are replaced by sound ones, which
            are a function of the weights alone.
        eps: Radius, in units of the input.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        kappa: Weight of the natural loss, default 0.
        beta: Weight of the method's bound against that of IBP, default 1.
        seed: Seed of what the loss draws, the same in each call; default 0.

    Raises:
        ConfigError: The loss is unknown, or its options are wrong.
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
        """Loss of a batch.

        Args:
            model: Classifier in eval mode, (B, ...) -> (B, classes).
            x: Inputs, (B, ...).
            y: Labels, (B,).

        Returns:
            Mean over the batch, 0-dim, differentiable in the model's parameters.
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
    """Result of `connect`: losses along the trained curve, and along the straight line between the models.

    Attributes:
        t: Positions on the curve, from 0 to 1.
        curve: Loss at each position of the curve.
        line: Loss at each position of the straight line, for which the middle point is the mean of the ends.
        name: Name of the loss.
        ends: Names of the two models.
        middle: Name -> weight of the trained middle point.
    """

    t: tuple[float, ...]
    curve: tuple[float, ...]
    line: tuple[float, ...]
    name: str = "loss"
    ends: tuple[str, str] = ("first", "second")
    middle: Weights = field(default_factory=dict, repr=False, compare=False)

    @property
    def barrier(self) -> float:
        """Highest loss on the curve minus the higher loss of its ends; 0 if an end is highest, NaN if a loss is NaN."""
        return _height(self.curve)

    @property
    def line_barrier(self) -> float:
        """Highest loss on the straight line minus the higher loss of its ends."""
        return _height(self.line)

    @property
    def connected(self) -> bool:
        """Whether the barrier is not above the rounding errors of float32 losses."""
        top = max(abs(self.curve[0]), abs(self.curve[-1]))
        return self.barrier <= 1e-5 * max(top, 1e-3)  # False for NaN

    def rows(self) -> list[Row]:
        """One row for each position: t, and the losses on curve and line."""
        return [{"t": t, "curve": a, "line": b} for t, a, b in zip(self.t, self.curve, self.line, strict=True)]

    def summary(self) -> str:
        """Losses of the ends, and the barrier, in words."""
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
    """Train the middle point of a Bezier curve between two models, and evaluate the loss along the curve.

    The training minimizes the expectation of loss(phi(t)) over t in U[0, 1], with phi the curve and one t in each step,
    by Adam with a cosine schedule. It starts from the middle of the straight line. The gradient of the middle point is
    2 t (1 - t) times the gradient at phi(t). A barrier means that this training found no path without one, not that
    there is no such path.

    Args:
        first: Model at t = 0. The models are copied, not changed, and the copies are in eval mode.
        second: Model at t = 1, of the same architecture.
        loss: ``loss(model, x, y)`` -> mean loss, 0-dim, such as a `CertifiedObjective`.
        data: Images (N, ...) and labels (N,), for training and evaluation.
        steps: Steps of Adam, default 300; 0 for the straight line.
        lr: Initial learning rate, default 0.01.
        batch_size: Samples in a batch of training and of evaluation, default 100. Training leaves the last, smaller
            batch of an epoch out, evaluation that of the data.
        points: Number of positions on the curve to evaluate, ends included, default 21.
        seed: Seed of the order of samples and of t, default 0.
        name: Name of the loss, for plot and summary.
        ends: Names of the models, for plot and summary.

    Returns:
        Losses along the curve and the line.

    Raises:
        InvalidInputError: The parameters of the models differ in name or shape, their buffers differ in value (the
            statistics of a batch norm hold for one point of the curve only), or a number is out of range.

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
    """Detached copies of the parameters of both models, after a check that a curve can connect them."""
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
    """Plot the loss along each curve and, dotted, along its straight line, as in Fig. C.3 to C.5 of Lee (2021).

    Args:
        found: One or several results, such as those of one pair of models under two losses.

    Returns:
        The figure, with an alt text.
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
