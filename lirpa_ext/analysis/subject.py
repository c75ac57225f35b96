"""What an analysis looks at: a copy of a model in float64, some samples, and the set around each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..certification.certifier import Certifier
from ..data import gather
from ..domain.perturbation import PerturbationLpNorm
from ..domain.specifications import check_labels
from ..engine import BoundedTensor
from ..errors import InvalidInputError, OptionError
from ..methods import label_option
from ..module.bounded_module import BoundedModule

__all__ = ["Subject", "options_by_method"]


class Subject:
    """A classifier, samples and a perturbation set: batches of them, and any method's bounds on them.

    Args:
        model: Classifier, (B, ...) -> (B, classes). It is copied, to `dtype` and eval mode.
        data: (x, y) tensors, a Dataset, or a DataLoader.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        dtype: Of the computation, default float64.
        batch_size: Samples at a time, default 64. One that the model names (`ImportedModel.batch_size`) rules.

    Attributes:
        model: The copy.
        x: Inputs, (N, ...).
        y: Labels, (N,).
        classes: Number of classes.

    Raises:
        InvalidInputError: The model fails on the inputs, a label is no class, or the range is empty.
        DataError: There is no sample.
        TraceError, TrainModeError: The model cannot be bounded.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        norm: float = 2,
        x_L: float | Tensor | None = None,
        x_U: float | Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        batch_size: int = 64,
    ) -> None:
        certifier = Certifier(model, "bcp", {}, norm, (x_L, x_U), dtype, None)
        x, y = gather(data)
        self.model = certifier.model
        self.x, self.y = certifier.place(x), y.long().to(certifier.device)
        self.classes = certifier.count_classes(x[:1])
        check_labels(self.y, self.classes)
        self.norm, self.data_range = float(norm), (x_L, x_U)
        self.batch_size = min(getattr(model, "batch_size", None) or batch_size, len(x))
        self._graph: BoundedModule | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels, batch by batch."""
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def graph(self, x: Tensor) -> BoundedModule:
        """The model's graph, traced when first asked for."""
        if self._graph is None:
            self._graph = BoundedModule(self.model, x)
        return self._graph

    def perturbed(self, x: Tensor, eps: float) -> BoundedTensor:
        """The inputs with the set around each."""
        return BoundedTensor(x, PerturbationLpNorm(eps, self.norm, *self.data_range))

    @torch.no_grad()
    def lower(self, x: Tensor, y: Tensor, eps: float, rows: Tensor, method: str, options: dict[str, Any]) -> Tensor:
        """Lower bounds of rows f(x') over each sample's set, (B, S).

        Args:
            x: Inputs, (B, ...).
            y: Labels, (B,), for methods that take them.
            eps: Radius.
            rows: (B, S, classes).
            method: Of `BoundedModule.compute_bounds`.
            options: Its options.
        """
        lower, _ = self.graph(x).compute_bounds(
            x=(self.perturbed(x, eps),), C=rows, method=method, bound_upper=False, **label_option(method, y) | options
        )
        return lower.detach()


def options_by_method(
    methods: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Options of each method; those that draw slopes at random get a fixed seed, so that the numbers come again.

    Raises:
        InvalidInputError: No method.
        OptionError: Options of a method that is not among them.
    """
    if not methods or isinstance(methods, str):
        raise InvalidInputError(f"methods is a sequence of at least one method, got {methods!r}")
    given = dict(options or {})
    unknown = [name for name in given if name not in methods]
    if unknown:
        raise OptionError(f"there are options of {unknown[0]!r}, which is none of the methods {', '.join(methods)}")
    found = {}
    for method in methods:
        name, chosen = method.lower(), dict(given.get(method, {}))
        drawn = name in ("sparse-slope", "slope:random") or (name.startswith("slope:") and "," in name)
        found[method] = ({"seed": 0} if drawn and "generator" not in chosen else {}) | chosen
    return found
