"""The backward pass with one lower slope for each sample and neuron, shared by all rows (Lee, 2021, 3.3 and C.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.lengths import flat
from ..domain.linear_maps import Dense
from ..domain.perturbation import PerturbationLpNorm
from ..engine import Node
from ..nodes.operators import flat_rows
from ..rules import RULES, Context, State, rows_times_constant
from ..rules.base import only_perturbed
from ..rules.linear import Affine
from .backward import RELU_CLASSES, BackwardPass

# Largest number of elements of a coefficient tensor: larger batches are split, which limits the memory.
_MOST_ELEMENTS = 2**23

# Number of elements of a temporary in elementwise operations that stays in the cache.
_CACHED = 2**16

ACTIVATIONS = (*RELU_CLASSES, "BoundLeakyRelu")

Slopes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lines:
    """The linear relaxation of a ReLU or LeakyReLU, v -> max(v, leak v), by two lines on its box.

    Lower line: s v with s = leak + (1 - leak) a for any a in [0, 1], which lies below the activation everywhere.
    Upper line: the chord of the activation on the box, which lies above it since the activation is convex. Where the
    box does not contain 0 inside, both lines are the activation itself for every a.

    Attributes:
        line: Slope of the upper line, of the shape of the input, (B, ...).
        offset: Value of the upper line at 0, (B, ...), at least 0.
        unstable: Where the box contains 0 inside, (B, ...), bool.
        leak: Slope of the activation below 0; 0 for a ReLU.
    """

    line: Tensor
    offset: Tensor
    unstable: Tensor
    leak: float

    @classmethod
    def of(cls, node: Node, state: BallBox) -> Lines:
        """The relaxation of a ReLU or LeakyReLU node on the box of its input's set."""
        lower, upper = (_dense(end) for end in state.box())
        leak = engine.slope_below_zero(node)
        chord, offset = _Chord.apply(lower, upper)
        if leak:
            chord, offset = leak + (1 - leak) * chord, (1 - leak) * offset
        return cls(chord, offset, (lower < 0) & (upper > 0), leak)

    def detach(self) -> Lines:
        """The same lines without gradients."""
        return Lines(_cut(self.line), _cut(self.offset), _cut(self.unstable), self.leak)

    def split(self, sizes: list[int]) -> list[Lines]:
        """The lines of consecutive parts of the batch, of the given sizes."""
        parts = zip(*(part.split(sizes) for part in (self.line, self.offset, self.unstable)), strict=True)
        return [Lines(line, offset, unstable, self.leak) for line, offset, unstable in parts]

    def lower_slope(self, a: Tensor) -> Tensor:
        """Slope of the lower line for parameters a in [0, 1], (B, ...); a does not count for stable neurons."""
        slope = a if not self.leak else self.leak + (1 - self.leak) * a
        unstable = self.unstable.to(slope)
        return torch.addcmul(self.line.detach() * (1 - unstable), slope, unstable)  # where() takes ten times as long


class _Chord(torch.autograd.Function):
    """Slope of the ReLU's chord on a box, c = u+ / (u+ - l-), and the chord's value at 0, -c l-.

    With w = u+ - l-, dc = ((1 - c) du+ + c dl-) / w, and the differential of the value is (1 - c)^2 du+ - c^2 dl-.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        below, above = lower.clamp(max=0), upper.clamp(min=0)
        width = (above - below).clamp_(min=torch.finfo(upper.dtype).tiny)
        chord = above.div_(width)
        ctx.save_for_backward(below, chord, width)
        return chord, (chord * below).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_chord: Tensor, to_value: Tensor) -> Any:
        below, chord, width = ctx.saved_tensors
        rest = 1 - chord
        rise = to_chord / width.clamp(min=torch.finfo(width.dtype).tiny ** 0.5)  # finite for the box {0}
        # sign() is 0 where l or u is clipped to 0, which has no gradient
        to_lower = (rise - to_value * chord).mul_(chord).mul_(below.sign().neg_())
        to_upper = rise.addcmul_(to_value, rest).mul_(rest).mul_(chord.sign())
        return to_lower, to_upper


class _Relax(torch.autograd.Function):
    """Rows a (S, B, ...) -> rows lam (S, B, ...) and bias (S, B) with a.sigma(v) >= lam.v + bias on the box.

    lam = slope max(a, 0) + line min(a, 0), bias = offset.min(a, 0). One autograd function that works on parts which
    stay in the cache: rows are the largest tensors of a pass, and most of its time is spent on moving them.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, slope: Tensor, line: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        extra = line - slope
        ctx.save_for_backward(a, slope, extra, offset)
        lam, bias = torch.empty_like(a), a.new_empty(a.shape[:2])
        rows, out = _in_memory(a), _in_memory(lam)
        parts = [_in_memory(part, 1) for part in (slope, extra, offset)]
        for which, own_slope, own_extra, own_offset in _slices(rows, parts):
            some, piece = rows[:, which], out[:, which]
            negative = some.clamp(max=0)
            torch.mul(some, own_slope, out=piece)
            piece.addcmul_(negative, own_extra)
            torch.sum(negative.mul_(own_offset), 2, out=bias[:, which])  # half the time of a batched product
        return lam, bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_lam: Tensor, to_bias: Tensor) -> Any:
        a, slope, extra, offset = ctx.saved_tensors
        needs = ctx.needs_input_grad
        to_lam = _like(to_lam, a)
        to_a = torch.empty_like(a) if needs[0] else None
        to_slope, to_line, to_offset = (torch.empty_like(slope) if need else None for need in needs[1:])
        rows, gradient = _in_memory(a), _in_memory(to_lam)
        out = None if to_a is None else _in_memory(to_a)
        sums = [None if total is None else _in_memory(total, 1) for total in (to_slope, to_line, to_offset)]
        parts = [_in_memory(part, 1) for part in (slope, extra, offset)]
        for which, own_slope, own_extra, own_offset in _slices(rows, parts):
            some, into, weight = rows[:, which], gradient[:, which], to_bias[:, which]
            negative = some.clamp(max=0)
            if sums[2] is not None:
                torch.sum(negative * weight.unsqueeze(2), 0, out=sums[2][which])
            if out is not None:
                below = (into * own_extra).addcmul_(weight.unsqueeze(2), own_offset)
                piece = torch.mul(into, own_slope, out=out[:, which])
                # where the row is negative, in one step: where() and masks take several times as long
                piece.add_(torch.ops.aten.hardtanh_backward(below, some, -torch.inf, 0.0))
            if sums[0] is not None:
                torch.sum((some - negative).mul_(into), 0, out=sums[0][which])
            if sums[1] is not None:
                torch.sum(negative.mul_(into), 0, out=sums[1][which])
        return to_a, to_slope, to_line, to_offset


def _like(rows: Tensor, other: Tensor) -> Tensor:
    """The same rows in the memory format of `other`."""
    return rows if rows.stride() == other.stride() else torch.empty_like(other).copy_(rows)


def _in_memory(values: Tensor, lead: int = 2) -> Tensor:
    """A view of values as of `_dense`, with the axes after the first `lead` flattened in their order in memory."""
    last = values.dim() == lead + 3 and values.stride(lead) == 1 and values.shape[lead] > 1
    return (values.movedim(lead, -1) if last else values).view(*values.shape[:lead], -1)


def _slices(rows: Tensor, values: list[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Slices of samples of rows (S, B, n) whose temporaries fit into the cache, and three values (b, n) of each."""
    size = max(1, _CACHED // (rows.shape[0] * max(rows.shape[2], 1)))
    for start in range(0, rows.shape[1], size):
        which = slice(start, start + size)
        first, second, third = (value[which] for value in values)
        yield which, first, second, third


class SlopePass(BackwardPass):
    """Lower bounds of C f by a backward pass with the two lines of `Lines` at every ReLU and LeakyReLU.

    Sound for every choice of slope parameters in [0, 1], by `Lines`; all other nodes are handled by `BackwardPass`.

    Args:
        module: The graph, with the input set on it.
        states: Sets of all nodes, of which only the boxes are used at ReLUs and LeakyReLUs.
        context: As in `BackwardPass`.
        slopes: Parameters a of the lower lines in [0, 1], by the activation's name, each of the shape of its input,
            (B, ...). None ends the rows at the last activations instead, at the minimum over their boxes, which is IBP
            with the last layer merged into C.
        perturbations: As in `BackwardPass`.
        final: As in `BackwardPass`.
    """

    def __init__(
        self,
        module: nn.Module,
        states: dict[str, State],
        context: Context,
        slopes: Slopes | None,
        perturbations: dict[str, PerturbationLpNorm] | None = None,
        final: Node | None = None,
    ) -> None:
        super().__init__(module, states, context, perturbations, final=final)
        self.slopes = slopes
        self._lines: dict[str, Lines] = {}
        self._weights: dict[str, Tensor] = {}

    @property
    def activations(self) -> list[Node]:
        """The perturbed ReLU and LeakyReLU nodes, inputs before users."""
        return [node for node in self.order if node.perturbed and type(node).__name__ in ACTIVATIONS]

    def lines(self, node: Node) -> Lines:
        """The relaxation of a ReLU or LeakyReLU node."""
        if node.name not in self._lines:
            state = self.states[node.inputs[0].name]
            assert isinstance(state, BallBox)
            self._lines[node.name] = Lines.of(node, state)
        return self._lines[node.name]

    def detached(self) -> SlopePass:
        """The same pass without gradients in weights and boxes, and without outward rounding."""

        states = {name: _mapped(state, _cut) for name, state in self.states.items()}
        other = SlopePass(
            self.module, states, replace(self.context, outward=False), self.slopes, self.perturbations, self.final
        )
        other._lines = {node.name: self.lines(node).detach() for node in self.activations}
        return other

    def with_slopes(self, slopes: Slopes | None) -> SlopePass:
        """The same pass with other slopes, as in the constructor."""
        other = SlopePass(self.module, self.states, self.context, slopes, self.perturbations, self.final)
        other._lines, other._weights = self._lines, self._weights
        return other

    def split(self, C: Tensor) -> list[tuple[SlopePass, Tensor]]:
        """Split the batch into parts whose coefficient tensors keep the limit of memory.

        Args:
            C: Specification rows, (B, S, outputs).

        Returns:
            (pass, rows) of consecutive parts of the batch.
        """
        sets = [state for state in self.states.values() if isinstance(state, BallBox)]
        width = max(state.center[0].numel() for state in sets)
        rows = C.split(max(1, _MOST_ELEMENTS // (width * C.shape[1])))
        if len(rows) == 1:
            return [(self, C)]
        samples = [len(some) for some in rows]

        def sizes(length: int) -> list[int]:
            """Sizes of the parts along a first axis of this length, which may hold several parts of each sample."""
            return [count * (length // len(C)) for count in samples]

        batched = self._batched()
        parts: list[dict[str, State]] = [{} for _ in rows]
        for name, state in self.states.items():
            for part, piece in zip(parts, _pieces(state, sizes, len(rows), name in batched), strict=True):
                part[name] = piece
        slopes: list[dict[str, Tensor]] = [{} for _ in rows]
        for name, value in (self.slopes or {}).items():
            for own, piece in zip(slopes, value.split(sizes(len(value))), strict=True):
                own[name] = piece
        lines = {node.name: self.lines(node).split(sizes(len(self.lines(node).line))) for node in self.activations}
        passes: list[SlopePass] = []
        index = torch.arange(len(C), device=C.device).split(samples)
        for which, states, own in zip(index, parts, slopes, strict=True):
            perturbations = {
                name: perturbation.take(which, self.states[name].center)  # type: ignore[union-attr]
                for name, perturbation in self.perturbations.items()
            }
            some = None if self.slopes is None else own
            passes.append(SlopePass(self.module, states, self.context, some, perturbations, self.final))
            passes[-1]._weights = self._weights
            passes[-1]._lines = {name: parts[len(passes) - 1] for name, parts in lines.items()}
        return list(zip(passes, rows, strict=True))

    def lower(self, C: Tensor) -> Tensor:
        """Lower bound of C f over the perturbation set, computed in parts of the batch.

        Args:
            C: Specification rows, (B, S, outputs).

        Returns:
            (B, S), differentiable in the weights, the boxes and the slopes.
        """
        if self.slopes is None:  # rows end at the last activations and take little memory
            return self.bound(C)
        bound = torch.cat([part.bound(rows) for part, rows in self.split(C)])
        if bound.requires_grad:
            bound.register_hook(_without_denormals)
        return bound

    def _step(self, node: Node, a: Tensor, relax: Any) -> tuple[list[Tensor | None], Tensor]:
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
        image = self._flattened(node)
        if image is not None:
            inputs = [self.states[parent.name] for parent in node.inputs]
            passed = (a @ self._weights[node.name]).view(*a.shape[:2], *image[1:], image[0]).movedim(-1, 2)
            return [passed], rows_times_constant(node, inputs, a)
        return super()._step(node, _dense_rows(a), relax)

    def _flattened(self, node: Node) -> torch.Size | None:
        """Shape (C, H, W) of the image that a dense layer reads flattened, if no other node reads the flattened image.

        The layer's rows can then be computed as rows of the image with channels last in memory, without a copy at the
        reshape. None for other nodes.
        """
        rule = RULES.get(type(node).__name__)
        if self.outward or not isinstance(rule, Affine) or not node.perturbed:
            return None
        parent = node.inputs[0]
        users = [other for other in self.order if parent in other.inputs]
        if len(users) != 1 or type(parent).__name__ not in ("BoundFlatten", "BoundReshape"):
            return None
        inputs = [self.states[other.name] for other in node.inputs]
        layer = rule.linear_map(node, inputs, 0) if only_perturbed(inputs) == 0 else None
        image = self.states[parent.inputs[0].name]
        if not isinstance(layer, Dense) or not isinstance(image, BallBox) or image.center.dim() != 4:
            return None
        channels, height, width = image.center.shape[1:]
        if layer.input_shape != (channels * height * width,):
            return None
        if node.name not in self._weights:  # the weight with columns in the order (H, W, C)
            columns = layer.weight.view(-1, channels, height * width).transpose(1, 2)
            self._weights[node.name] = columns.reshape(layer.weight.shape)
        return image.center.shape[1:]


def _without_denormals(gradient: Tensor | None) -> Tensor | None:
    """A gradient with tiny entries set to 0: they would become denormal numbers, which take CPUs ten times as long."""
    if gradient is None:
        return None
    return torch.where(gradient.abs() < torch.finfo(gradient.dtype).tiny ** 0.5, 0.0, gradient)


def _cut(value: Tensor) -> Tensor:
    """The tensor without gradient; a copy if it was made in inference mode, since autograd takes no such tensors."""
    return value.clone() if value.is_inference() else value.detach()


def _pieces(state: State, sizes: Callable[[int], list[int]], count: int, batched: bool) -> list[Any]:
    """Parts of a set, or of a constant that differs by sample; `count` times the same for other constants."""
    if isinstance(state, Tensor):
        return list(state.split(sizes(len(state)))) if batched else [state] * count
    own = sizes(len(state.center))
    fields = [[None] * count if value is None else value.split(own) for value in _fields(state)]
    return [BallBox(*values) for values in zip(*fields, strict=True)]  # type: ignore[arg-type]


def _fields(state: BallBox) -> tuple[Tensor | None, ...]:
    return state.center, state.radius, state.lower, state.upper


def _mapped(state: State, function: Callable[[Tensor], Tensor]) -> State:
    if isinstance(state, Tensor):
        return function(state)
    return BallBox(*(None if value is None else function(value) for value in _fields(state)))  # type: ignore[arg-type]


def _dense(values: Tensor) -> Tensor:
    """Values (B, ...), contiguous in memory; images (B, C, H, W) with channels last, which takes half the CPU time."""
    return values.contiguous(memory_format=torch.channels_last if values.dim() == 4 else torch.contiguous_format)


def _dense_rows(rows: Tensor) -> Tensor:
    """Coefficient rows (S, B, ...), contiguous in memory as in `_dense`."""
    return _dense(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
