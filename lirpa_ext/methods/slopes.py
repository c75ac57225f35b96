"""CROWN-IBP and its variants: one backward pass whose lower slopes are chosen by a rule or by one gradient step.

S. Lee, W. Lee, J. Park, J. Lee, Towards better understanding of training certifiably robust models against
adversarial examples, NeurIPS 2021; S. Lee's dissertation (2021), 3.3.3, C.3, C.4, C.8. Proof of soundness: the
intermediate boxes are sound, and on sound boxes the bound holds for every choice of slopes in [0, 1]
(`lirpa_ext.passes.slopes.Lines`), also for slopes that depend on the labels, on random numbers or on a gradient.
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
    """Slopes by one projected sign-gradient step on the cross entropy of the worst-case margins.

    Lee (2021), (3.3.24) and (C.8.7): a0 ~ U[0, 1]; a = clip(a0 - eta sign(d CE / d a0), 0, 1). The bound has gradients
    in the weights, also through the boxes, but none through a. Since the step uses the sign alone, the cross entropy
    may be replaced by any increasing function of it, sample by sample: here by the log-sum-exp of the other classes'
    margins, whose gradient does not vanish in floating point for samples that are verified by far.

    Args:
        problem: The graph and the requested bounds.
        labels: Classes for whose margins the step is taken, (B,). Required.
        eta: Size of the one step, at least 1, default 1, which takes every slope with a gradient to 0 or 1.
        steps: Number of steps, default 1. Several steps have size `alpha`.
        alpha: Size of each of several steps, default 0.1; Lee (2021) uses 7 steps of 0.1.
        generator: Source of the random start; default torch's global generator.
        seed: Seed of a new generator, in place of `generator`.
        intermediate: Boxes of the hidden layers: "ibp" (default) or "bcp", which is tighter for l2.
        norms: Spectral norms of "bcp": "bound" (default), or "estimate" for training, which is no certificate.
        outward: Enlarge sets to cover floating-point errors. Default: in float64, with "bound" (`Problem.context`).
        loss_fusion: Bound the cross entropy of the labels itself, with one row instead of classes - 1
            (`lirpa_ext.passes.loss_fusion`), and return (None, upper bound (B, 1)). C and the lower side cannot be
            requested then. Default False.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.

    Raises:
        OptionError: `labels` is missing, or another option has a wrong value or conflicts with the request.
        InvalidInputError: `labels` do not fit the output.
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
    """The method that computes each activation's slopes from the box of its input."""

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
    """The method that draws each activation's slopes from a distribution that depends on the box of its input."""

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
    """Bounds with slopes that the caller gives.

    Args:
        problem: The graph and the requested bounds.
        slopes: Parameters of the lower lines in [0, 1], each of the shape of its activation's input (B, ...), by the
            activation's name as in `Relaxation`, or as a sequence in the order of the graph. Required; parameters of
            stable neurons do not count.
        labels: Labels, (B,), for `loss_fusion` alone.
        intermediate: As in `sparse_slope`.
        norms: As in `sparse_slope`.
        outward: As in `sparse_slope`.
        loss_fusion: As in `sparse_slope`.

    Returns:
        As `sparse_slope`.

    Raises:
        OptionError: `slopes` is missing, or another option has a wrong value or conflicts with the request.
        InvalidInputError: Slopes have other names or shapes than the activations, leave [0, 1], or are NaN.
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
    """Interval bound propagation with the last layer merged into C (Lee, 2021, 3.3.2).

    Args:
        problem: The graph and the requested bounds.
        outward: As in `sparse_slope`.

    Returns:
        As `sparse_slope`.
    """
    return _SlopeBound(problem, None, "ibp", "bound", outward, False).bounds(None)


class _SlopeBound:
    """Bounds by slopes, and their gradient in the slopes, on fixed boxes of the hidden layers."""

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
        """The pass `plain` without gradients in weights and boxes."""
        with _saveable():
            return self.plain.detached()

    def lines(self, node: Node) -> Lines:
        """Relaxation of a ReLU or LeakyReLU, without gradient."""
        with _saveable():
            return self.detached.lines(node)

    def box(self, node: Node) -> tuple[Tensor, Tensor]:
        """Box of an activation's input, without gradient."""
        return set_of(self.detached.states[node.inputs[0].name]).box()

    def descent(self, slopes: Slopes) -> dict[str, Tensor]:
        """Sign of the gradient of each sample's loss in the slopes; 0 for a gradient of 0 or NaN, and stable neurons.

        No gradient in weights or boxes is computed, and the autograd graph of each part of the batch is freed at once.
        """
        signs: dict[str, list[Tensor]] = {name: [] for name in slopes}
        rows = self.chords.detach().rows(self.margins) if self.loss_fusion else self.margins
        with _saveable(), torch.enable_grad():
            own = {name: value.clone().requires_grad_() for name, value in slopes.items()}
            for part, some in self.detached.with_slopes(own).split(rows):
                loss = (-part.lower(some)).logsumexp(1).sum()
                nodes = part.activations
                leaves = [part.slopes[node.name] for node in nodes]  # type: ignore[index]
                read = leaves and loss.requires_grad  # False if every row ends before it reaches a ReLU
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if read else [None] * len(leaves)
                for node, leaf, gradient in zip(nodes, leaves, gradients, strict=True):
                    sign = torch.zeros_like(leaf) if gradient is None else gradient.sign().nan_to_num_(0.0)
                    signs[node.name].append(sign)
        return {name: torch.cat(values) for name, values in signs.items()}

    def bounds(self, slopes: Slopes | None, signs: dict[str, Tensor] | None = None) -> BoundResult:
        """The requested bounds, with the given slopes; `signs` is only recorded in the result."""
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
    """The requested bounds of C f, or of f, by a pass with slopes.

    Args:
        problem: The graph and the requested bounds.
        chosen: The pass, with its slopes.
        relaxation: Slopes to record in the result. Default None.
    """
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
    """Context that leaves torch's inference mode, in which no gradients can be computed; no effect outside of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def random_source(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    """The source of a method's random numbers, from its options.

    Args:
        generator: A generator, or None.
        seed: Seed of a new generator on the CPU, or None.

    Returns:
        The generator; None, for torch's global generator, if both arguments are None.

    Raises:
        OptionError: Both arguments are given.
    """
    if generator is not None and seed is not None:
        raise OptionError("give a generator or a seed, not both")
    return generator if seed is None else torch.Generator().manual_seed(seed)


def uniform(like: Tensor, source: torch.Generator | None) -> Tensor:
    """Uniform random numbers in [0, 1) of the shape, type and device of a tensor, drawn on the generator's device.

    Args:
        like: The tensor.
        source: The generator; None for torch's global one.
    """
    device = like.device if source is None else source.device
    return torch.rand(like.shape, generator=source, dtype=like.dtype, device=device).to(like.device)


def adaptive(box: tuple[Tensor, Tensor]) -> Tensor:
    """Lower slopes of CROWN, 1 where u+ + l- > 0 and else 0, the slope with the smaller area between the lines.

    Args:
        box: l and u, (B, ...) each.
    """
    lower, upper = box
    return (upper.clamp(min=0) + lower.clamp(max=0) > 0).to(upper)


def chord(box: tuple[Tensor, Tensor]) -> Tensor:
    """Lower slopes of CAP, u+ / (u+ - l-), parallel to the upper line; without gradient.

    Args:
        box: l and u, (B, ...) each.
    """
    lower, upper = box
    above, below = upper.detach().clamp(min=0), lower.detach().clamp(max=0)
    return above / (above - below).clamp(min=torch.finfo(upper.dtype).tiny)


def _bernoulli(p: float, q: float) -> Callable[[tuple[Tensor, Tensor], torch.Generator | None], Tensor]:
    """Random slopes 0 or 1 (Lee, 2021, C.4): P(a = 1 | |l| > |u|) = p, P(a = 1 | |l| <= |u|) = q."""

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
    """The method "slope:NAME" for a variant's name."""
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
