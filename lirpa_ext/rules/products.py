"""Matrix products with a constant, which may differ by sample, as the adjacency matrices of graphs do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.products import matrices, product_adjoint
from ..domain.rounding import gamma
from ..engine import Node
from .base import Rows, State, only_perturbed
from .context import Context
from .linear import Own, TimesConstant, constant_product, shape_of, sum_to


class MatMul(TimesConstant):
    """Rule of a matrix product: with a constant of any rank on either side, which may differ by sample; or of two sets.

    For two boxes with middles m, n and half widths r, s: |X Y - m n| <= |m| s + r |n| + r s.
    """

    def __init__(self) -> None:
        super().__init__(constant_product, self._own_matrix)

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        x, y = inputs[0], inputs[1]
        if not isinstance(x, BallBox) or not isinstance(y, BallBox):
            return super().propagate(node, inputs, center, context)
        stacks = x.center.dim() == y.center.dim() == center.dim() >= 3  # else the product sums over the batch axis
        if not stacks or not len(x.center) == len(y.center) == len(center):
            return None
        (m, r), (n, s) = (((u + l) / 2, (u - l) / 2) for l, u in (x.box(), y.box()))  # noqa: E741
        reach = m.abs() @ s + r @ (n.abs() + s)
        middle = m @ n
        if context.outward:
            loss = gamma(center.dtype, 4 * m.shape[-1])
            reach = (1 + loss) * reach + loss * (m.abs() @ n.abs())
        return BallBox.from_box(center, torch.minimum(middle - reach, center), torch.maximum(middle + reach, center))

    @staticmethod
    def _own_matrix(node: Node, constant: Tensor, state: BallBox, index: int, center: Tensor) -> Own | None:
        if constant.dim() < 3:
            return None  # one matrix for all samples, with the batch along one of its axes
        left = index == 1
        exact = matrices(constant, left).double()
        largest = torch.linalg.matrix_norm(exact, 2).reshape(len(exact), -1).amax(1)
        lead = zip(constant.shape[1:-2], state.center.shape[1:-2], strict=True)
        copies = math.prod(own for own, shared in lead if shared == 1)
        margin = 1 + 16 * sum(exact.shape[-2:]) * torch.finfo(exact.dtype).eps
        norms = (largest * math.sqrt(copies) * margin).to(center.dtype)
        sizes = torch.linalg.vector_norm(constant, dim=-1 if left else -2, keepdim=True)
        rounded = 1 + gamma(center.dtype, exact.shape[-1])
        magnitude = constant.abs()

        def spread(half: Tensor) -> Tensor:
            return torch.matmul(magnitude, half) if left else torch.matmul(half, magnitude)

        return Own(norms * rounded, (sizes * rounded).expand_as(center), spread, exact.shape[-1])

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        index = only_perturbed(inputs)
        if index is None:
            return None
        state, constant = inputs[index], inputs[1 - index]
        assert isinstance(state, BallBox) and isinstance(constant, Tensor)
        batched = constant.dim() == state.center.dim() >= 3 and constant.shape[0] == len(state.center) > 1
        if not batched:
            return super().adjoint(node, inputs, rows)
        passed = sum_to(product_adjoint(constant, rows, index == 1), shape_of(state))
        return [passed if i == index else None for i in range(2)]
