"""CROWN-IBP and its relatives: one backward pass whose lower slopes are chosen by a rule or by one gradient step.

S. Lee, W. Lee, J. Park, J. Lee, Towards better understanding of training certifiably robust models against
adversarial examples, NeurIPS 2021; S. Lee's dissertation (2021), 3.3.3, C.3, C.4, C.8. Proof of soundness: the
intermediate boxes are sound, and on them the bound holds for every choice of slopes in [0, 1]
(`lirpa_ext.passes.slopes.Lines`), so also for one that depends on the labels, on chance or on a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.specifications import check_labels, identity_rows, margin_rows
from ..engine import Node
from ..errors import InvalidInputError, OptionError, UnknownMethodError
from ..passes.intervals import propagate_intervals
from ..passes.loss_fusion import chords_of_margins, cross_entropy_bound
from ..passes.slopes import Lines, SlopePass, Slopes
from .base import FAMILIES, BoundResult, Family, Method, Problem, context_result, set_of
from .bcp import tightened
from .relaxation import Relaxation

# Without C the bounds of so many outputs are those of a box, as in "bcp".
_LARGEST_IDENTITY = 1024

# Rows that one pass carries from a hidden layer, of which each neuron is one.
_ROWS_AT_ONCE = 64

VARIANTS = ("slope:crown", "slope:cap", "slope:random", "slope:P,Q", "slope:ibp", "slope:same")


def sparse_slope(
    problem: Problem,
    *,
    labels: Tensor | None = None,
    eta: float = 1.0,
    steps: int = 1,
    alpha: float = 0.1,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    intermediate: str = "ibp",
    norms: str = "bound",
    outward: bool | None = None,
    loss_fusion: bool = False,
) -> BoundResult:
    """Slopes by one projected sign-gradient step of the cross entropy of the upper margins, (3.3.24) and (C.8.7).

    a0 ~ U[0, 1]; a = clip(a0 - eta sign(d CE / d a0), 0, 1); the bound has gradients in the weights, through the
    boxes too, but none through a. The step takes the sign alone, so the cross entropy may be replaced by
    anything that grows with it, sample by sample: here by the log-sum-exp of the other classes' margins, whose
    gradient does not vanish in floating point where every margin is verified by far.

    Args:
        problem: What to bound.
        labels: The classes whose margins the step is for, (B,). Required.
        eta: Size of the one step, at least 1: it takes every slope with a gradient to 0 or 1.
        steps: Number of steps, default 1. More than one have size `alpha`.
        alpha: Size of each of several steps; the source takes 7 of 0.1.
        generator: Source of the random start; default torch's own.
        seed: Or the seed of a new one.
        intermediate: Boxes of the hidden layers: "ibp" (default) or "bcp", which is tighter for l2.
        norms: Spectral norms of "bcp": "bound" (default), or "estimate" for training, which is no certificate.
        outward: Outward rounding of what floating-point arithmetic may lose. Default: in float64, with "bound".
        loss_fusion: Bound the cross entropy of the labels itself, with one row in place of classes - 1
            (`lirpa_ext.passes.loss_fusion`): (None, upper bound (B, 1)). Then C is not taken, nor the lower side.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.
    """
    if labels is None:
        raise OptionError('"sparse-slope" takes its step for a class: pass labels=y, of shape (B,)')
    if not eta >= 1:
        raise OptionError(f"eta must be at least 1, for slopes of 0 or 1, got {eta}; for smaller steps: steps, alpha")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or not alpha > 0:
        raise OptionError(f"steps must be a whole number from 1 and alpha positive, got {steps} and {alpha}")
    work = _SlopeBound(problem, labels, intermediate, norms, outward, loss_fusion)
    source = random_source(generator, seed)
    slopes = {node.name: uniform(work.lines(node).line, source) for node in work.plain.activations}
    signs: dict[str, Tensor] = {}
    for _ in range(steps):
        signs = work.descent(slopes)
        size = eta if steps == 1 else alpha
        slopes = {name: (value - size * signs[name]).clamp(0, 1) for name, value in slopes.items()}
    return work.bounds(slopes, signs)


def _fixed(choose: Callable[[tuple[Tensor, Tensor]], Tensor]) -> Method:
    """The method that chooses each activation's slopes by a rule of its box."""

    def method(
        problem: Problem,
        *,
        labels: Tensor | None = None,
        intermediate: str = "ibp",
        norms: str = "bound",
        outward: bool | None = None,
        loss_fusion: bool = False,
    ) -> BoundResult:
        work = _SlopeBound(problem, labels, intermediate, norms, outward, loss_fusion)
        return work.bounds({node.name: choose(work.box(node)) for node in work.plain.activations})

    return method


def _drawn(draw: Callable[[tuple[Tensor, Tensor], torch.Generator | None], Tensor]) -> Method:
    """The method that draws each activation's slopes from a distribution given by its box."""

    def method(
        problem: Problem,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        intermediate: str = "ibp",
        norms: str = "bound",
        outward: bool | None = None,
        loss_fusion: bool = False,
    ) -> BoundResult:
        work = _SlopeBound(problem, labels, intermediate, norms, outward, loss_fusion)
        source = random_source(generator, seed)
        return work.bounds({node.name: draw(work.box(node), source) for node in work.plain.activations})

    return method


def slope_same(
    problem: Problem,
    *,
    slopes: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    intermediate: str = "ibp",
    norms: str = "bound",
    outward: bool | None = None,
    loss_fusion: bool = False,
) -> BoundResult:
    """The slopes that the caller gives.

    Args:
        problem: What to bound.
        slopes: In [0, 1], each of the shape of its activation's input (B, ...): by the activation's name, or one for
            each activation in the order of the graph, as in `Relaxation`. Those of stable neurons are not read.
        labels: Of `loss_fusion` alone.
        intermediate: As in `sparse_slope`.
        norms: As in `sparse_slope`.
        outward: As in `sparse_slope`.
        loss_fusion: As in `sparse_slope`.

    Returns:
        As `sparse_slope`.
    """
    work = _SlopeBound(problem, labels, intermediate, norms, outward, loss_fusion)
    shapes = {node.name: work.lines(node).line.shape for node in work.plain.activations}
    if slopes is None:
        raise OptionError(f'"slope:same" needs slopes=, for {", ".join(shapes) or "no activation at all"}')
    named = dict(slopes) if isinstance(slopes, Mapping) else dict(zip(shapes, slopes, strict=False))
    if set(named) != set(shapes) or len(slopes) != len(shapes):
        raise InvalidInputError(f"there are slopes for {sorted(named)}, the activations are {sorted(shapes)}")
    for name, value in named.items():
        if value.shape != shapes[name]:
            raise InvalidInputError(f"slopes of {name!r} must be {tuple(shapes[name])}, got {tuple(value.shape)}")
        if not ((value >= 0) & (value <= 1)).all():
            raise InvalidInputError(f"slopes of {name!r} leave [0, 1], where alone the bound holds, or are NaN")
    return work.bounds({name: named[name].detach().to(work.output) for name in shapes})


def slope_ibp(problem: Problem, *, outward: bool | None = None) -> BoundResult:
    """Interval bound propagation with the last layer merged into C: both lines level (3.3.2)."""
    return _SlopeBound(problem, None, "ibp", "bound", outward, False).bounds(None)


class _SlopeBound:
    """A bound by slopes on fixed boxes of the hidden layers: and its gradient in the slopes."""

    def __init__(
        self,
        problem: Problem,
        labels: Tensor | None,
        intermediate: str,
        norms: str,
        outward: bool | None,
        loss_fusion: bool,
    ) -> None:
        if intermediate not in ("ibp", "bcp"):
            raise OptionError(f'intermediate must be "ibp" or "bcp", got {intermediate!r}')
        output = problem.final.output_shape
        if labels is not None:
            if len(output) != 2:
                raise InvalidInputError(f"labels are for logits (B, classes), the output is {tuple(output)}")
            check_labels(labels, output[1])
            if len(labels) != output[0]:
                raise InvalidInputError(f"there are {len(labels)} labels for a batch of {output[0]}")
        if loss_fusion and (labels is None or problem.C is not None or problem.lower):
            raise OptionError("loss_fusion bounds the cross entropy of labels=y from above: no C, bound_lower=False")
        self.problem, self.labels, self.loss_fusion = problem, labels, loss_fusion
        context = problem.context(norms, outward)
        if intermediate == "bcp":
            states = tightened(problem.propagate(context, keep=True))
        else:
            states = propagate_intervals(problem.module, context)
            states = tightened(states) if context.outward else states
        self.context = context
        self.plain = SlopePass(problem.module, states, context, {})
        self.output: Tensor = states[problem.final.name].center  # type: ignore[union-attr]
        if labels is not None:
            self.margins = margin_rows(labels, output[1], self.output.dtype, self.output.device)
        if loss_fusion:
            self.chords = chords_of_margins(self.plain, self.margins)

    @cached_property
    def detached(self) -> SlopePass:
        """The pass without gradients in weights and boxes."""
        with _saveable():
            return self.plain.detached()

    def lines(self, node: Node) -> Lines:
        """Relaxation of an activation, without gradient."""
        with _saveable():
            return self.detached.lines(node)

    def box(self, node: Node) -> tuple[Tensor, Tensor]:
        """Box of an activation's input, without gradient."""
        return set_of(self.detached.states[node.inputs[0].name]).box()

    def descent(self, slopes: Slopes) -> dict[str, Tensor]:
        """Sign of the gradient of each sample's loss in the slopes; 0 where it is 0 or NaN, and for stable neurons.

        No gradient of weights or boxes is formed, and each part of the batch frees its graph at once.
        """
        signs: dict[str, list[Tensor]] = {name: [] for name in slopes}
        rows = self.chords.detach().rows(self.margins) if self.loss_fusion else self.margins
        with _saveable(), torch.enable_grad():
            own = {name: value.clone().requires_grad_() for name, value in slopes.items()}
            for part, some in self.detached.with_slopes(own).split(rows):
                loss = (-part.lower(some)).logsumexp(1).sum()
                nodes = part.activations
                leaves = [part.slopes[node.name] for node in nodes]  # type: ignore[index]
                read = leaves and loss.requires_grad  # not where every row ends before it reaches a ReLU
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if read else [None] * len(leaves)
                for node, leaf, gradient in zip(nodes, leaves, gradients, strict=True):
                    sign = torch.zeros_like(leaf) if gradient is None else gradient.sign().nan_to_num_(0.0)
                    signs[node.name].append(sign)
        return {name: torch.cat(values) for name, values in signs.items()}

    def bounds(self, slopes: Slopes | None, signs: dict[str, Tensor] | None = None) -> BoundResult:
        """What was asked, with these slopes."""
        relaxation = None
        if slopes is not None:
            unstable = {node.name: self.lines(node).unstable for node in self.plain.activations}
            relaxation = Relaxation(dict(slopes), unstable, signs)
        chosen = self.plain.with_slopes(slopes)
        if self.loss_fusion:
            upper = cross_entropy_bound(chosen, self.chords, self.margins).unsqueeze(1)
            return context_result(self.context, None, upper, relaxation)
        return slope_result(self.problem, chosen, relaxation)


def slope_result(problem: Problem, chosen: SlopePass, relaxation: Relaxation | None = None) -> BoundResult:
    """The asked sides of C f, or of f, by a pass with slopes."""
    output = chosen.states[problem.final.name]
    assert isinstance(output, BallBox)
    shape = output.center.shape

    def minimum(C: Tensor | None, sign: int) -> Tensor:
        if C is not None:
            return chosen.lower(C.expand(shape[0], -1, -1))
        outputs = shape[1:].numel()
        if outputs > _LARGEST_IDENTITY:
            lower, upper = output.box()
            return lower if sign > 0 else -upper
        return chosen.lower(identity_rows(output.center, sign).expand(shape[0], -1, -1)).view(shape)

    return problem.result(chosen.context, minimum, relaxation)


def box_by_rows(chosen: SlopePass, values: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of a hidden node's values (B, ...), of their shape: a row for each neuron.

    Args:
        chosen: The pass that ends at the node, with its slopes.
        values: Some values of the node.
    """
    ends = []
    for sign in (1, -1):
        rows = identity_rows(values, sign)[0].split(_ROWS_AT_ONCE)
        bounds = [chosen.lower(some.expand(len(values), -1, -1)) for some in rows]
        ends.append(sign * torch.cat(bounds, dim=1).view_as(values))
    return ends[0], ends[1]


def _saveable() -> contextlib.AbstractContextManager[Any]:
    """Leaves torch's inference mode, whose tensors no gradient can be taken through; else nothing."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def random_source(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    if generator is not None and seed is not None:
        raise OptionError("give a generator or a seed, not both")
    return generator if seed is None else torch.Generator().manual_seed(seed)


def uniform(like: Tensor, source: torch.Generator | None) -> Tensor:
    """U[0, 1] of the shape of `like`, drawn on the generator's device."""
    device = like.device if source is None else source.device
    return torch.rand(like.shape, generator=source, dtype=like.dtype, device=device).to(like.device)


def adaptive(box: tuple[Tensor, Tensor]) -> Tensor:
    """CROWN's: 1[u+ + l- > 0], the smaller of the two areas."""
    lower, upper = box
    return (upper.clamp(min=0) + lower.clamp(max=0) > 0).to(upper)


def chord(box: tuple[Tensor, Tensor]) -> Tensor:
    """CAP's: u+ / (u+ - l-), parallel to the upper line."""
    lower, upper = box
    above, below = upper.detach().clamp(min=0), lower.detach().clamp(max=0)
    return above / (above - below).clamp(min=torch.finfo(upper.dtype).tiny)


def _bernoulli(p: float, q: float) -> Callable[[tuple[Tensor, Tensor], torch.Generator | None], Tensor]:
    """C.4: P(a = 1 | |l| > |u|) = p, P(a = 1 | |l| <= |u|) = q."""

    def draw(box: tuple[Tensor, Tensor], source: torch.Generator | None) -> Tensor:
        lower, upper = box
        chance = torch.where(lower.abs() > upper.abs(), p, q)
        return (uniform(upper, source) < chance).to(upper)

    return draw


_FIXED: dict[str, Method] = {
    "crown": _fixed(adaptive),
    "cap": _fixed(chord),
    "random": _drawn(lambda box, source: uniform(box[1], source)),
    "same": slope_same,
    "ibp": slope_ibp,
}


def _variant(name: str) -> Method:
    """Method "slope:name"."""
    if name in _FIXED:
        return _FIXED[name]
    parts = name.split(",")
    try:
        p, q = (float(part) for part in parts)
    except ValueError:
        raise UnknownMethodError(f'unknown variant "slope:{name}"; known are {", ".join(VARIANTS)}') from None
    if not (0 <= p <= 1 and 0 <= q <= 1):
        raise InvalidInputError(f'"slope:{name}": P and Q are probabilities, from 0 to 1')
    return _drawn(_bernoulli(p, q))


def _the_step(name: str) -> Method:
    if name:
        raise UnknownMethodError(f'"sparse-slope" has no variant {name!r}; fixed slopes are {", ".join(VARIANTS)}')
    return sparse_slope


FAMILIES["sparse-slope"] = Family(_the_step, ("sparse-slope",))
FAMILIES["slope"] = Family(_variant, VARIANTS)
