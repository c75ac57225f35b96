"""The slopes that a method chose for the lower lines of activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Relaxation:
    """The slopes that a call used.

    Attributes:
        slopes: Parameters of the lower lines in [0, 1], by the activation's name in the order of the graph, each of
            the shape of its input (B, ...), without gradient. To be given to ``method="slope:same"``.
        unstable: Neurons whose box contains 0 inside, likewise, bool: only their slopes count.
        gradients: Signs of the last step's gradient, likewise; None for slopes that took no step.
    """

    slopes: dict[str, Tensor]
    unstable: dict[str, Tensor]
    gradients: dict[str, Tensor] | None = None

    @property
    def sparsity(self) -> float:
        """Share of the unstable neurons whose slope is 0; NaN if there is none."""
        return self._share({name: slope == 0 for name, slope in self.slopes.items()})

    @property
    def zero_gradients(self) -> float:
        """Share of the unstable neurons whose gradient was 0, and whose slope was left as it was; NaN if none."""
        if self.gradients is None:
            return float("nan")
        return self._share({name: sign == 0 for name, sign in self.gradients.items()})

    def _share(self, marked: dict[str, Tensor]) -> float:
        unstable = sum(int(mask.sum()) for mask in self.unstable.values())
        found = sum(int((marked[name] & mask).sum()) for name, mask in self.unstable.items())
        return found / unstable if unstable else float("nan")
