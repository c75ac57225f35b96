"""The backward pass of the ball-box bounds, which carries coefficient rows from the output to the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.ball_box_min import ball_box_min, relu_ball_box_min
from ..domain.batch_axis import check_is_batch, of_samples, of_whole_samples, positions
from ..domain.lengths import flat
from ..domain.perturbation import PerturbationLpNorm
from ..domain.rounding import row_slack
from ..domain.scalar_functions import scalar_function
from ..engine import Node
from ..engine.limits import is_out_of_memory
from ..engine.positive_list import is_listed, is_ours
from ..nodes.operators import flat_rows, flat_set
from ..rules import RULES, Context, RelaxedRule, State, adjoint_and_bias, frobenius


@dataclass(frozen=True)
class Part:
    """The k coordinates of a ReLU's input at which the caller of a backward pass chooses the rows to carry on.

    These are all coordinates, or only the open ones, where the box contains values of both signs. In the other
    coordinates the ReLU is linear, so that their rows pass through exactly. The time of a pass grows with k.

    Attributes:
        set: Center (B, k), radius (B,), lower and upper corner (B, k) of the coordinates.
        index: Flat positions of the coordinates, (B, k), padded with others for samples with fewer open ones; None if
            all coordinates are chosen.
        exact: Slope of the ReLU at coordinates that are not open, 0 or 1, (B, 1, n); None if all are chosen.
    """

    set: tuple[Tensor, Tensor, Tensor, Tensor]
    index: Tensor | None = None
    exact: Tensor | None = None

    @classmethod
    def open(cls, state: BallBox) -> Part:
        """The open coordinates of a set; k is their largest number in a sample, which a GPU must transfer."""
        center, radius, lower, upper = flat_set(state)
        is_open = (lower < 0) & (upper > 0)
        index = is_open.to(torch.uint8).topk(max(int(is_open.sum(1).max()), 1), dim=1).indices
        some = [values.gather(1, index) for values in (center, lower, upper)]
        return cls((some[0], radius, some[1], some[2]), index, (lower >= 0).to(center).unsqueeze(1))

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (B, S, n) restricted to the coordinates, (B, S, k)."""
        return rows if self.index is None else rows.gather(2, self._positions(rows))

    def scatter(self, rows: Tensor, lam: Tensor) -> Tensor:
        """Rows (B, S, n) with `lam` (B, S, k) at the coordinates, and `rows` times the exact slopes elsewhere."""
        return lam if self.exact is None else (rows * self.exact).scatter(2, self._positions(rows), lam)

    def _positions(self, rows: Tensor) -> Tensor:
        assert self.index is not None
        return self.index.unsqueeze(1).expand(-1, rows.shape[1], -1)


# (node, rows a (B, S, k) at the coordinates, the coordinates) -> rows lam (B, S, k) of the ReLU's input, and a lower
# bound (B, S) on a.relu(v) - lam.v over the set
Relax = Callable[[Any, Tensor, Part], tuple[Tensor, Tensor]]

RELU_CLASSES = ("BoundRelu", "BoundBallBoxRelu")


class BackwardPass:
    """Lower bounds of C f over the perturbation set, by carrying coefficient rows backward through the graph.

    At a ReLU, a.relu(v) >= lam.v + min over its input's set of (a.relu(v) - lam.v) for any rows lam, which the caller
    chooses. Affine nodes carry rows exactly, other nodes by their linear relaxation on the box. At a node without a
    relaxation, rows end at their minimum over the node's own set. At the input, rows end at their minimum over the
    perturbation set. Each step is an inequality that holds on the whole set, so that the sum is a lower bound.

    Args:
        module: The graph, with the input set on it.
        states: Sets of all nodes (``propagate(..., keep=True)``).
        context: Switches; with `outward`, bounds on floating-point errors are subtracted. Nodes at which rows end early
            are noted in its `ended`.
        perturbations: Perturbation of each input node by name, default those that the graph holds.
        all_coordinates: Let the caller choose rows at all coordinates of a ReLU, not only at the open ones. Default
            False.
        final: The node whose value is bounded, default the graph's output.
    """

    def __init__(
        self,
        module: nn.Module,
        states: dict[str, State],
        context: Context,
        perturbations: dict[str, PerturbationLpNorm] | None = None,
        all_coordinates: bool = False,
        final: Node | None = None,
    ) -> None:
        self.module = module
        self.states = states
        self.all_coordinates = all_coordinates
        self.context = context
        self.outward = context.outward
        self.final = module.final_node() if final is None else final  # type: ignore[operator]
        self.order = engine.ancestors_in_order(self.final)
        self._parts: dict[str, Part] = {}
        self._handed: dict[Any, Any] | None = (
            None  # own values of constants, while the engine's nodes hold the sets and values of this pass
        )
        self.perturbations = perturbations or {
            node.name: PerturbationLpNorm.of(node.perturbation)
            for node in self.order
            if node.perturbed and isinstance(node, engine.BoundInput)
        }

    @property
    def batch(self) -> int:
        """Number of samples; a node's first axis may hold several parts of each (`lirpa_ext.domain.batch_axis`)."""
        return len(self.states[next(iter(self.perturbations))].center)  # type: ignore[union-attr]

    def take(self, index: Tensor, all_coordinates: bool = False) -> BackwardPass:
        """The same pass for some samples of the batch.

        Args:
            index: Indices of the samples, (K,), which may repeat.
            all_coordinates: As in the constructor.
        """

        batched = self._batched()

        def some(node: Node) -> State:
            state = self.states[node.name]
            if isinstance(state, BallBox):
                return state.take(positions(index, len(state.center), self.batch))
            return state[positions(index, len(state), self.batch)] if node.name in batched else state

        states = {node.name: some(node) for node in self.order}
        perturbations = {
            name: perturbation.take(index, self.states[name].center)  # type: ignore[union-attr]
            for name, perturbation in self.perturbations.items()
        }
        return BackwardPass(self.module, states, self.context, perturbations, all_coordinates, self.final)

    def _batched(self) -> set[str]:
        """Names of the constant nodes whose value differs by sample."""
        names = set()
        for node in self.order:
            own = self.states[node.name]
            for parent in engine.aligned_constants(node) if isinstance(own, BallBox) else []:
                shape = self.states[parent.name].shape  # type: ignore[union-attr]
                if len(shape) == own.center.dim() and shape[0] == len(own.center):  # type: ignore[union-attr]
                    names.add(parent.name)
        return names

    def bound(self, C: Tensor, relax: Relax | None = None) -> Tensor:
        """Lower bound of C f over the perturbation set.

        Args:
            C: Specification rows, (B, S, outputs).
            relax: Chooses the rows lam at each ReLU (`Relax`); None (default) for lam = 0, which ends the rows there
                at the minimum of a.relu(v).

        Returns:
            (B, S), differentiable in the sets, the weights, and all that `relax` depends on.

        Raises:
            UnsupportedNodeError: The first axis of the output is not that of the batch.
        """
        output = self.states[self.final.name]
        assert isinstance(output, BallBox)
        check_is_batch(self.final, output.center, self.batch)
        batch = len(C)
        start = C.transpose(0, 1).reshape(C.shape[1], C.shape[0], *output.center.shape[1:])
        rows: dict[str, Tensor] = {self.final.name: start}
        try:
            return self._pass(rows, batch, relax).t()
        finally:
            self._take_back_from_engine()

    def _pass(self, rows: dict[str, Tensor], batch: int, relax: Relax | None) -> Tensor:
        """Carry rows (S, B, ...) of the output to the inputs, and return their lower bound, (S, B)."""
        start = rows[self.final.name]
        total = start.new_zeros(len(start), batch)
        for node in reversed(self.order):
            a = rows.pop(node.name, None)
            if a is None:
                continue
            if self.outward:
                total = total - self._slack(node, a, batch)
            if not node.perturbed:
                terms = a * self.states[node.name]  # type: ignore[operator]
                total = total + torch.where(a == 0, 0.0, terms).reshape(len(a), batch, -1).sum(2)
            elif isinstance(node, engine.BoundInput):
                center = self.states[node.name].center  # type: ignore[union-attr]
                total = total + self.perturbations[node.name].minimum(flat_rows(a), center).t()
            else:
                passed, bias = self._step(node, a, relax)
                total = total + of_samples(bias, batch)
                for parent, coefficients in zip(node.inputs, passed, strict=False):
                    if coefficients is not None:
                        known = rows.get(parent.name)
                        rows[parent.name] = coefficients if known is None else known + coefficients
        return total

    def _step(self, node: Node, a: Tensor, relax: Relax | None) -> tuple[list[Tensor | None], Tensor]:
        """Rows of the node's inputs, (S, B, ...), and the bias (S, B) of the inequality."""
        name = type(node).__name__
        if name in RELU_CLASSES:
            return self._relu(node, a, relax)
        inputs = [self.states[parent.name] for parent in node.inputs]
        affine = adjoint_and_bias(node, inputs, a)
        if affine is not None and all(_fits(*pair, a) for pair in zip(affine[0], inputs, strict=False)):
            return affine
        function = scalar_function(node)
        if function is not None and isinstance(inputs[0], BallBox):
            passed, bias = function.below(a, *inputs[0].box())
            return [passed], bias
        rule = RULES.get(name)
        relaxed = rule.relax(node, inputs, a) if isinstance(rule, RelaxedRule) else None
        if relaxed is not None:
            return relaxed
        own = is_ours(node, "bound_backward")
        if not own and not is_listed(node, "relaxation"):
            return self._end(node, a, "no linear relaxation of it is known to hold")
        if self._handed is None:
            self._hand_bounds_to_engine()
        try:
            pairs, offset, _ = engine.bound_backward(node, a, self.final)
        except NotImplementedError as error:
            return self._end(node, a, f"it has no linear relaxation here: {error}")
        except Exception as error:  # the engine raises errors of any class; an error of our own nodes is a defect
            if own or is_out_of_memory(error):
                raise
            return self._end(node, a, f"the engine failed: {type(error).__name__}: {error}")
        rows = [None if pair[0] is None else pair[0].to(a.dtype) for pair in pairs]
        for coefficients, state in zip(rows, inputs, strict=False):
            if not _fits(coefficients, state, a):
                assert coefficients is not None
                return self._end(node, a, f"the engine's rows have the shape {tuple(coefficients.shape)}")
        return rows, torch.as_tensor(offset, dtype=a.dtype, device=a.device).expand(a.shape[:2])

    def _end(self, node: Node, a: Tensor, why: str) -> tuple[list[Tensor | None], Tensor]:
        """End rows at a node, at their minimum over its own set, and note the reason in the context."""
        self.context.ended[node.name] = f"{type(node).__name__}: {why}"
        output = self.states[node.name]
        assert isinstance(output, BallBox)
        return [], ball_box_min(flat_rows(a), *flat_set(output)).t()

    def _slack(self, node: Node, a: Tensor, batch: int) -> Tensor:
        """Bound on the rounding errors of the products with rows a (S, B, ...) at this node, (S, B).

        The rows passed on have an error e with |e| <= gamma |a| |W|, so that |e.v| <= gamma ||a|| ||W||_F ||v||.
        """
        inputs = [self.states[parent.name] for parent in node.inputs]
        sets = [
            whole
            for state in [*inputs, self.states[node.name]]
            if isinstance(state, BallBox) and (whole := of_whole_samples(state, batch)) is not None
        ]
        if not sets:
            return a.new_zeros(len(a), batch)
        rows, size = flat_rows(a.reshape(len(a), batch, -1)), frobenius(node, inputs)
        terms = max(flat(state.center).shape[1] for state in sets)
        slack = torch.stack([row_slack(rows, state, terms) for state in sets]).sum(0)
        return slack.t() * (1 + size)

    def _relu(self, node: Node, a: Tensor, relax: Relax | None) -> tuple[list[Tensor | None], Tensor]:
        state = self.states[node.inputs[0].name]
        assert isinstance(state, BallBox)
        rows = flat_rows(a)
        if relax is None:
            bias, _ = relu_ball_box_min(rows, torch.zeros_like(rows), *flat_set(state))
            return [None], bias.t()
        part = self._parts.get(node.name)
        if part is None:
            part = self._parts[node.name] = Part(flat_set(state)) if self.all_coordinates else Part.open(state)
        lam, bias = relax(node, part.gather(rows), part)
        return [part.scatter(rows, lam).transpose(0, 1).view_as(a)], bias.t()

    def _hand_bounds_to_engine(self) -> None:
        """Put bounds, and constants' values for these samples, on the nodes for the engine's relaxations to read."""
        self._handed = {}
        for node in self.order:
            state = self.states[node.name]
            lower, upper = state.box() if isinstance(state, BallBox) else (state, state)
            engine.set_bounds(node, lower, upper)
            if not isinstance(state, BallBox) and not node.inputs:
                self._handed[node] = getattr(node, "value", None)
                object.__setattr__(node, "value", state)

    def _take_back_from_engine(self) -> None:
        for node, value in (self._handed or {}).items():
            object.__setattr__(node, "value", value)
        self._handed = None


def _fits(rows: Tensor | None, state: State, a: Tensor) -> bool:
    """Whether rows of a node's input have the shape (S, *shape of the input's set), for S rows a of the node."""
    return rows is None or not isinstance(state, BallBox) or rows.shape == (len(a), *state.center.shape)
