"""Matrix products with a constant operand of any rank, on either side, bounded through this package's linear maps.

The engine's bounds of such products have a wrong shape for vectors, and 0.3 cannot bound products with the constant on
the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.lengths import flat
from ..rules import adjoint_and_bias
from .operators import flat_rows
from .repairs import affine_backward, shapes_of_inputs


class BoundMatMulByAdjoint(engine.bound_ops.BoundMatMul):  # type: ignore[misc, name-defined]
    """A matrix product: the engine's bounds for two perturbed operands, this package's for one constant operand."""

    @property
    def by_engine(self) -> bool:
        """Whether the engine's own code bounds the node, as it does if both operands are perturbed."""
        return all(parent.perturbed for parent in self.inputs[:2])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, value in (("x", x), ("y", y)):  # 0.3 reads these; nn.Module.__setattr__ might register parameters
            object.__setattr__(self, name, value)
            object.__setattr__(self, f"{name}_shape", value.shape)
        return torch.matmul(x, y)

    def interval_propagate(self, *v: Any, **kwargs: Any) -> Any:
        constant = [not parent.perturbed for parent in self.inputs[:2]]
        if not any(constant):
            return super().interval_propagate(*v, **kwargs)
        (low_x, high_x), (low_y, high_y) = (tuple(interval) for interval in v[:2])
        x, y = low_x, low_y
        if all(constant):
            return torch.matmul(x, y), torch.matmul(x, y)
        if kwargs.get("C") is not None:
            return self._of_rows(kwargs["C"], v)
        if constant[0]:
            middle, half = (low_y + high_y) / 2, (high_y - low_y) / 2
            center, spread = torch.matmul(x, middle), torch.matmul(x.abs(), half)
        else:
            middle, half = (low_x + high_x) / 2, (high_x - low_x) / 2
            center, spread = torch.matmul(middle, y), torch.matmul(half, y.abs())
        return center - spread, center + spread

    def _of_rows(self, C: Tensor, v: Any) -> tuple[Tensor, Tensor]:
        """Bounds (B, S) of the rows C (B, S, outputs) of the product, with C merged into the constant."""
        index = 0 if self.inputs[0].perturbed else 1
        lower, upper = (flat(end) for end in v[index])
        rows = C.transpose(0, 1).unflatten(2, self.output_shape[1:])
        passed = adjoint_and_bias(self, shapes_of_inputs(self), rows)
        if passed is None:
            lower, upper = (flat(end) for end in self.interval_propagate(*v))
            coefficients = C
        else:
            coefficients = flat_rows(passed[0][index])  # type: ignore[arg-type]
        middle, half = (lower + upper).unsqueeze(2) / 2, (upper - lower).unsqueeze(2) / 2
        center, spread = (coefficients @ middle).squeeze(2), (coefficients.abs() @ half).squeeze(2)
        return center - spread, center + spread

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        one = sum(parent.perturbed for parent in self.inputs[:2]) == 1
        if one and all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            rows = last_lA if last_lA is not None else last_uA
            if adjoint_and_bias(self, shapes_of_inputs(self), rows) is not None:
                return affine_backward(self, last_lA, last_uA)
        return super().bound_backward(last_lA, last_uA, *x, **kwargs)


OPS: dict[str, Any] = {"onnx::MatMul": BoundMatMulByAdjoint}
