"""The subject of an analysis: a copy of a model, in float64 by default, samples, and the perturbation set."""

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
    """A classifier with samples and a perturbation set, for analyses: gives batches, and bounds by any method.

    Args:
        model: Classifier, (B, ...) -> (B, classes). It is copied, not changed.
        data: (x, y) tensors, a Dataset, or a DataLoader.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        dtype: torch.float32 or torch.float64 (default), of the whole computation.
        batch_size: Samples at a time, default 64. A batch size of the model (`ImportedModel.batch_size`) replaces it.

    Attributes:
        model: The copy, in `dtype` and eval mode.
        x: Inputs, (N, ...), in `dtype`.
        y: Labels, (N,), int64.
        classes: Number of classes.

    Raises:
        InvalidInputError: The model fails on the inputs, a label is no class, or the data range is empty.
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
        """Inputs (B, ...) and labels (B,), batch by batch."""
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def graph(self, x: Tensor) -> BoundedModule:
        """Graph of the model, traced with the inputs x, (B, ...), at the first call."""
        if self._graph is None:
            self._graph = BoundedModule(self.model, x)
        return self._graph

    def perturbed(self, x: Tensor, eps: float) -> BoundedTensor:
        """Inputs x, (B, ...), with the perturbation set of radius eps."""
        return BoundedTensor(x, PerturbationLpNorm(eps, self.norm, *self.data_range))

    @torch.no_grad()
    def lower(self, x: Tensor, y: Tensor, eps: float, rows: Tensor, method: str, options: dict[str, Any]) -> Tensor:
        """Lower bounds of rows f(x') over the set of each sample.

        Args:
            x: Inputs, (B, ...).
            y: Labels, (B,), for methods that take labels.
            eps: Radius, in units of the input.
            rows: Coefficients of the logits, (B, S, classes).
            method: Any method of `BoundedModule.compute_bounds`.
            options: Options of the method.

        Returns:
            Lower bounds, (B, S).
        """
        lower, _ = self.graph(x).compute_bounds(
            x=(self.perturbed(x, eps),), C=rows, method=method, bound_upper=False, **label_option(method, y) | options
        )
        return lower.detach()


def options_by_method(
    methods: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Options of each method; a method that draws slopes at random gets seed 0, to make the numbers reproducible.

    Args:
        methods: Names of the methods.
        options: Method -> its options; None for none.

    Returns:
        Method -> its options.

    Raises:
        InvalidInputError: There is no method.
        OptionError: There are options of a method that is not among `methods`.
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
