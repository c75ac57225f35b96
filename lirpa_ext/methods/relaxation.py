"""The slopes of the activations' lower lines that a method chose."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Relaxation:
    """The slopes that a bound was computed with.

    Attributes:
        slopes: Parameters of the lower lines in [0, 1], by the activation's name in the order of the graph, each of
            the shape of its input (B, ...), without gradient; accepted by ``method="slope:same"``.
        unstable: Whether a neuron's box contains 0 inside, so that its slope counts; bool, by name, (B, ...).
        gradients: Signs of the gradient at the last step, by name, (B, ...); None for methods without a step.
    """

    slopes: dict[str, Tensor]
    unstable: dict[str, Tensor]
    gradients: dict[str, Tensor] | None = None

    @property
    def sparsity(self) -> float:
        """Share of the unstable neurons whose slope parameter is 0; NaN if there are no unstable neurons."""
        return self._share({name: slope == 0 for name, slope in self.slopes.items()})

    @property
    def zero_gradients(self) -> float:
        """Share of the unstable neurons with a gradient of 0, whose slope the step did not change; NaN if none."""
        if self.gradients is None:
            return float("nan")
        return self._share({name: sign == 0 for name, sign in self.gradients.items()})

    def _share(self, marked: dict[str, Tensor]) -> float:
        unstable = sum(int(mask.sum()) for mask in self.unstable.values())
        found = sum(int((marked[name] & mask).sum()) for name, mask in self.unstable.items())
        return found / unstable if unstable else float("nan")
