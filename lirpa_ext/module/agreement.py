"""When a graph and its model are compared, and what is remembered between comparisons.

At each build, the package checks that samples do not depend on each other (once for each batch size), and that graph
and model agree at points around the example. Before the first bounds, it compares them at points of the perturbation
set, too. Later it does so only where a comparison may say something new:

* The model's modules, hooks, attributes or tied weights changed: the graph is built again.
* The model is in a mode in which it has not been compared yet: that mode is compared with eval mode.
* The perturbation set reaches far beyond those of earlier comparisons. This is skipped while the model trains: the test
  would make a GPU wait, and training certifies nothing.
* The model reads values of tensors in Python: graph and model are then compared at every call, since the trace may
  differ from the model anywhere. Without such reads, the trace holds for all inputs, and a few points suffice to tell
  whether the engine computes every function in it correctly.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ..domain.perturbation import PerturbationLpNorm
from ..engine.limits import is_out_of_memory
from ..errors import TrainModeError
from .changes import Snapshot, modes
from .samples import check_samples_apart
from .tracing import in_mode_of, plain
from .watching import NoDropout, Reads

Inputs = tuple[Tensor, ...]

_FAR = 1.0  # distance beyond the range of earlier sets that counts as far, in units of its width


class Agreement:
    """Record of the comparisons of a model with its graph.

    Attributes:
        built_for: Shapes, dtypes and devices of the inputs that the graph was built for; None while there is no graph.
        reads: Places, as "file:line", at which the model reads values of tensors in Python.
    """

    def __init__(self) -> None:
        self.built_for: list[tuple[object, ...]] | None = None
        self.reads: list[str] = []
        self._snapshot: Snapshot | None = None
        self._sizes: set[int] = set()
        self._modes: set[tuple[bool, ...]] = set()
        self._spans: list[tuple[float, float]] | None = None

    def examine(self, model: nn.Module, shadow: nn.Module, example: Inputs) -> None:
        """Check the model before it is traced.

        Args:
            model: The user's model.
            shadow: A copy of the model in eval mode.
            example: Example inputs, (B, ...) each.

        Raises:
            TraceError: Samples of a batch read each other, or the model draws random numbers.
            TrainModeError: The model computes something else in its current mode than in eval mode.
        """
        self.built_for, self._spans = None, None
        watch = Reads(shadow)

        def run() -> None:
            with contextlib.suppress(Exception), watch:  # the trace will report it
                shadow(*example)

        written = Snapshot.around(shadow, run)
        if self._snapshot is None or self._snapshot.changes(model):
            self._sizes.clear()
            self._modes.clear()
        self.reads, self._snapshot = watch.places, Snapshot(model, written)
        if len(example[0]) not in self._sizes:
            check_samples_apart(shadow, example)
            self._sizes.add(len(example[0]))
        self.check_mode(model, shadow, example)

    def serve(self, inputs: Inputs) -> None:
        """Note that the graph has been built for inputs of these shapes, dtypes and devices."""
        self.built_for = _kinds(inputs)

    def serves(self, inputs: Inputs) -> bool:
        """Whether the graph was built for inputs of these shapes, dtypes and devices."""
        return self.built_for == _kinds(inputs)

    def changes(self, model: nn.Module) -> str:
        """Text of how the model differs from the one that was traced; "" if it does not."""
        return "" if self._snapshot is None else self._snapshot.changes(model)

    def knows_mode(self, model: nn.Module) -> bool:
        """Whether the model has been compared in its current mode."""
        return modes(model) in self._modes

    def check_mode(self, model: nn.Module, shadow: nn.Module, example: Inputs) -> None:
        """Check that the model computes the same in its current mode as in eval mode, dropout aside.

        Args:
            model: The user's model.
            shadow: A copy of the model in eval mode.
            example: Inputs to compare at, (B, ...) each.

        Raises:
            TrainModeError: The outputs differ.
        """
        own = in_mode_of(model)
        if own is not None:
            try:
                expected = shadow(*example)
                with NoDropout():
                    actual = own(*example)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return  # the trace will report it
            if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
                return
            alike = actual.shape == expected.shape and actual.dtype == expected.dtype
            if not (alike and torch.allclose(actual, expected, rtol=1e-4, atol=1e-6, equal_nan=True)):
                raise TrainModeError(
                    f"{type(model).__name__} computes something else in train mode, which it is in, than in eval mode, "
                    "which bounds are of: call model.eval()"
                )
        self._modes.add(modes(model))

    def is_new(self, inputs: Inputs, training: bool) -> bool:
        """Whether graph and model must be compared on the set of these inputs; the set then counts as compared.

        Args:
            inputs: Inputs, perturbed ones among them.
            training: Whether the model trains.
        """
        perturbed = [x for x in inputs if isinstance(getattr(x, "ptb", None), PerturbationLpNorm)]
        if not perturbed or (training and self._spans is not None and not self.reads):
            return False
        spans = []
        for x in perturbed:
            lower, upper = x.ptb.box(plain(x))  # type: ignore[attr-defined]
            spans.append((float(lower.amin()), float(upper.amax())))
        if self._spans is None or len(self._spans) != len(spans):
            self._spans = spans
            return True
        seen = list(zip(self._spans, spans, strict=True))
        if not self.reads and all(not _far_beyond(known, span) for known, span in seen):
            return False
        self._spans = [(min(known[0], span[0]), max(known[1], span[1])) for known, span in seen]
        return True


def _far_beyond(known: tuple[float, float], span: tuple[float, float]) -> bool:
    slack = _FAR * (known[1] - known[0])
    return span[0] < known[0] - slack or span[1] > known[1] + slack


def _kinds(inputs: Inputs) -> list[tuple[object, ...]]:
    return [(x.shape, x.dtype, x.device) for x in inputs]
