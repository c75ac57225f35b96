"""Concentration of the loss gradients during training (Fig. 2.3 of S. Lee's dissertation, 2021)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...randomized.graddiv import dpp, gradients, kappa, mean_cosine, mean_resultant_length
from ...reporting.results import Row
from ..traces import Trace

__all__ = ["ConcentrationTrace", "concentration_record"]


class ConcentrationTrace(Trace):
    """Concentration of the loss gradients after each epoch; a record has the means over samples of `PANELS`."""

    NAME = "concentration"
    CALLBACK = "lirpa_ext.analysis.studies.GradientConcentration"
    PANELS: ClassVar[dict[str, str]] = {
        "kappa": "κ / d (2.2.16)",
        "cosine": "mean cosine (2.2.17)",
        "dpp": "-log det of the Gram matrix (2.2.19)",
        "rho": "mean resultant length ρ",
    }

    def values(self, run: str, panel: str) -> list[tuple[int, float]]:
        """Pairs (epoch, value) of a run."""
        return [(row["epoch"], row[panel]) for row in self.records if row["run"] == run]

    def summary(self) -> str:
        """The mean resultant length of each run at the start and at the end, in words."""
        ends = {run: self.values(run, "rho") for run in self.runs()}
        told = "; ".join(f"{run} from {found[0][1]:.3g} to {found[-1][1]:.3g}" for run, found in ends.items())
        return f"Concentration of the loss gradients through training; mean resultant length: {told}."


def concentration_record(model: nn.Module, x: Tensor, y: Tensor, draws: int, generator: torch.Generator) -> Row:
    """One record of `ConcentrationTrace`, without run, epoch, step and eps: means over the samples.

    Args:
        model: Randomized classifier, (B, ...) -> (B, classes).
        x: Samples, (B, ...).
        y: Labels, (B,).
        draws: Gradients of each sample.
        generator: Source of the draws.

    Raises:
        InvalidInputError: The model is not randomized, or `draws` is below 2.
    """
    found = gradients(model, x, y, draws, generator, create_graph=False)
    measures = {"kappa": kappa, "cosine": mean_cosine, "dpp": dpp, "rho": mean_resultant_length}
    return {name: float(measure(found).mean()) for name, measure in measures.items()}
