"""Base classes of nodes with linear relaxations of this package, and of nodes of scalar functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import engine
from ..domain.scalar_functions import ScalarFunction


class BoundRelaxed(engine.Bound):  # type: ignore[misc]
    """Base class of nodes of one perturbed input with a linear relaxation. Subclasses write `below` for one side."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Carry coefficient rows back: rows.f(x) >= (new rows).x + bias for all x in the box.

        Args:
            rows: Coefficients of the node's output, (S, B, ...).
            lower: Lower corner of the input's box, (B, ...).
            upper: Upper corner of the input's box, (B, ...).

        Returns:
            New rows, (S, B, ...), and bias, (S, B).
        """
        raise NotImplementedError

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if not all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            raise NotImplementedError(f"{type(self).__name__} has no backward bound in patches mode")
        box = x[0].lower, x[0].upper
        lower: Any = (None, 0) if last_lA is None else self.below(last_lA, *box)
        upper: Any = (None, 0)
        if last_uA is not None:  # max of a.f is -min of -a.f
            rows, bias = self.below(-last_uA, *box)
            upper = -rows, -bias
        rest = [(None, None)] * (len(self.inputs) - 1)
        return [(lower[0], upper[0]), *rest], lower[1], upper[1]


class BoundScalar(ScalarFunction, BoundRelaxed):
    """Base class of nodes that apply a scalar function to each entry. Subclasses write `value` and `derivative`.

    A function with constants, such as the ends of a clamp, reads these from the node's `inputs`.
    """

    def forward(self, x: Tensor, *constants: Tensor) -> Tensor:
        return self.value(x)

    def interval_propagate(self, *v: Any) -> Any:
        return self.box(v[0][0], v[0][1])
