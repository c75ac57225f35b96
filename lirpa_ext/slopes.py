"""The backward pass with one lower slope for each sample and neuron, shared by all rows (3.3 and C.3 of the source)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import engine
from .backward import RELU_CLASSES, BackwardPass
from .operators import flat_rows
from .perturbation import PerturbationLpNorm
from .rules import State
from .sets import BallBox, flat

# Elements of the widest coefficient tensor of one part of the batch. Convolutions of a few dozen rows take half
# the time for each of what they take for a thousand, and temporaries of this size are not asked of the kernel anew.
_MOST_ELEMENTS = 2**20

ACTIVATIONS = (*RELU_CLASSES, "BoundLeakyRelu")

Slopes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lines:
    """The relaxation of an activation on its box: v -> max(v, leak v) with two lines.

    Lower line: s v with s = leak + (1 - leak) a for *any* a in [0, 1], which is below the activation everywhere.
    Upper line: through its values at both ends, line (v - l-) for a ReLU; it is convex, so below its chord.
    Where the box does not contain 0 inside, both are the activation itself, whatever a is.

    Attributes:
        line: Slope of the upper line, the shape of the input (B, ...).
        offset: Its value at 0, likewise, at least 0.
        unstable: Where the box contains 0 inside, likewise, bool.
        leak: Slope below 0, 0 for a ReLU.
    """

    line: Tensor
    offset: Tensor
    unstable: Tensor
    leak: float

    @classmethod
    def of(cls, node: Any, state: BallBox) -> Lines:
        """Of a ReLU or LeakyReLU node, on the box of its input's set."""
        lower, upper = (_dense(end) for end in state.box())
        leak = engine.slope_below_zero(node)
        below, above = lower.clamp(max=0), upper.clamp(min=0)
        chord = above / (above - below).clamp(min=torch.finfo(upper.dtype).tiny)
        offset = -chord * below
        if leak:
            chord, offset = leak + (1 - leak) * chord, (1 - leak) * offset
        return cls(chord, offset, (lower < 0) & (upper > 0), leak)

    def lower_slope(self, a: Tensor) -> Tensor:
        """Slope of the lower line for parameters a in [0, 1]."""
        slope = a if not self.leak else self.leak + (1 - self.leak) * a
        return torch.where(self.unstable, slope, self.line)


class _Relax(torch.autograd.Function):
    """Rows a (S, B, ...) -> rows lam and bias (S, B) with a.sigma(v) >= lam.v + bias on the box.

    lam = slope max(a, 0) + line min(a, 0), bias = offset.min(a, 0). As one function, since rows are the largest
    tensors of the pass: autograd's own graph of the same keeps five of them, this one.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, slope: Tensor, line: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, slope, line, offset)
        negative = a.clamp(max=0)
        lam = (a * slope).addcmul_(negative, line - slope)
        return lam, _dot(negative, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_lam: Tensor, to_bias: Tensor) -> Any:
        a, slope, line, offset = ctx.saved_tensors
        needs_a, needs_slope, needs_line, needs_offset = ctx.needs_input_grad
        negative = a.clamp(max=0)
        to_bias = to_bias.view(*to_bias.shape, *[1] * (a.dim() - 2))
        to_a = to_slope = to_line = to_offset = None
        if needs_line:
            to_line = (negative * to_lam).sum(0)
        if needs_offset:
            to_offset = (negative * to_bias).sum(0)
        if needs_slope:
            to_slope = ((a - negative) * to_lam).sum(0)
        if needs_a:
            below = (to_lam * (line - slope)).addcmul_(to_bias, offset).mul_(a < 0)
            to_a = below.addcmul_(to_lam, slope)
        return to_a, to_slope, to_line, to_offset


class SlopePass(BackwardPass):
    """Lower bound of rows of the output by the two lines of `Lines` at every ReLU and LeakyReLU.

    Sound for every choice of slopes in [0, 1]: see `Lines`; the rest is `BackwardPass`.

    Args:
        module: The graph, with the input set on it.
        states: Sets of all nodes; of a set only the box is used.
        slopes: Parameters a of the lower lines by the activation's name, each of the shape of its input (B, ...);
            None ends the rows at the last activations instead, at the minimum over their boxes (IBP with the
            last layer merged).
        perturbations: As in `BackwardPass`.
        outward: As in `BackwardPass`.
        final: As in `BackwardPass`.
    """

    def __init__(
        self,
        module: nn.Module,
        states: dict[str, State],
        slopes: Slopes | None,
        perturbations: dict[str, PerturbationLpNorm] | None = None,
        outward: bool = False,
        final: Any = None,
    ) -> None:
        super().__init__(module, states, perturbations, outward=outward, final=final)
        self.slopes = slopes
        self._lines: dict[str, Lines] = {}

    @property
    def activations(self) -> list[Any]:
        """The nodes that are relaxed, inputs before users."""
        return [node for node in self.order if node.perturbed and type(node).__name__ in ACTIVATIONS]

    def lines(self, node: Any) -> Lines:
        """The relaxation of an activation."""
        if node.name not in self._lines:
            state = self.states[node.inputs[0].name]
            assert isinstance(state, BallBox)
            self._lines[node.name] = Lines.of(node, state)
        return self._lines[node.name]

    def detached(self) -> SlopePass:
        """The same pass without gradients in weights and boxes."""

        def cut(value: Tensor) -> Tensor:
            return value.clone() if value.is_inference() else value.detach()

        states = {name: _mapped(state, cut) for name, state in self.states.items()}
        return SlopePass(self.module, states, self.slopes, self.perturbations, self.outward, self.final)

    def with_slopes(self, slopes: Slopes | None) -> SlopePass:
        """The same pass with other slopes."""
        other = SlopePass(self.module, self.states, slopes, self.perturbations, self.outward, self.final)
        other._lines = self._lines
        return other

    def split(self, C: Tensor) -> list[tuple[SlopePass, Tensor]]:
        """Passes and rows of consecutive parts of the batch, small enough for the rows C (B, S, outputs)."""
        sets = [state for state in self.states.values() if isinstance(state, BallBox)]
        width = max(state.center[0].numel() for state in sets)
        rows = C.split(max(1, _MOST_ELEMENTS // (width * C.shape[1])))
        if len(rows) == 1:
            return [(self, C)]
        sizes = [len(some) for some in rows]
        batched = self._batched()
        parts: list[dict[str, State]] = [{} for _ in rows]
        for name, state in self.states.items():
            for part, piece in zip(parts, _pieces(state, sizes, name in batched), strict=True):
                part[name] = piece
        slopes: list[dict[str, Tensor]] = [{} for _ in rows]
        for name, value in (self.slopes or {}).items():
            for own, piece in zip(slopes, value.split(sizes), strict=True):
                own[name] = piece
        passes = []
        index = torch.arange(len(C), device=C.device).split(sizes)
        for which, states, own in zip(index, parts, slopes, strict=True):
            perturbations = {
                name: perturbation.take(which, self.states[name].center)  # type: ignore[union-attr]
                for name, perturbation in self.perturbations.items()
            }
            some = None if self.slopes is None else own
            passes.append(SlopePass(self.module, states, some, perturbations, self.outward, self.final))
        return list(zip(passes, rows, strict=True))

    def lower(self, C: Tensor) -> Tensor:
        """Lower bound of C f, (B, S), for rows C (B, S, outputs): `bound` in parts of the batch."""
        return torch.cat([part.bound(rows) for part, rows in self.split(C)])

    def _step(self, node: Any, a: Tensor, relax: Any) -> tuple[list[Tensor | None], Tensor]:
        if type(node).__name__ in ACTIVATIONS and node.perturbed:
            if self.slopes is None:
                state = self.states[node.name]
                assert isinstance(state, BallBox)
                lower, upper = (flat(end).unsqueeze(2) for end in state.box())
                rows = flat_rows(a)
                bias = rows @ (0.5 * (lower + upper)) - rows.abs() @ (0.5 * (upper - lower))
                return [None], bias.squeeze(2).t()
            lines = self.lines(node)
            slope = lines.lower_slope(_dense(self.slopes[node.name]))
            lam, bias = _Relax.apply(_dense_rows(a), slope, lines.line, lines.offset)
            return [lam], bias
        return super()._step(node, _dense_rows(a), relax)


def _pieces(state: State, sizes: list[int], batched: bool) -> list[Any]:
    """Parts of a set, or of a constant that differs by sample; other constants as they are."""
    if isinstance(state, Tensor):
        return list(state.split(sizes)) if batched else [state] * len(sizes)
    fields = [[None] * len(sizes) if value is None else value.split(sizes) for value in _fields(state)]
    return [BallBox(*values) for values in zip(*fields, strict=True)]  # type: ignore[arg-type]


def _fields(state: BallBox) -> tuple[Tensor | None, ...]:
    return state.center, state.radius, state.lower, state.upper


def _mapped(state: State, function: Callable[[Tensor], Tensor]) -> State:
    if isinstance(state, Tensor):
        return function(state)
    return BallBox(*(None if value is None else function(value) for value in _fields(state)))  # type: ignore[arg-type]


def _dense(values: Tensor) -> Tensor:
    """Images (B, C, H, W) with channels last, in which convolutions of the CPU take half the time."""
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def _dense_rows(rows: Tensor) -> Tensor:
    """Rows (S, B, C, H, W) of images with channels last."""
    return _dense(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]) if rows.dim() == 5 else rows


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Dot product of rows (S, B, ...) with each sample's values (B, ...), (S, B)."""
    if rows.dim() == 5:
        rows, values = rows.movedim(2, -1), values.movedim(1, -1)
    return (flat_rows(rows) @ flat(values).unsqueeze(2)).squeeze(2).t()
