"""The work behind `certify`, batch by batch: bounds, attacks, checks of the bounds at points, certified radii."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..attacks import Attack
from ..domain.perturbation import PerturbationLpNorm
from ..domain.specifications import margin_rows
from ..engine import BoundedTensor
from ..engine.limits import is_out_of_memory
from ..errors import (
    EstimateError,
    InvalidInputError,
    OptionError,
    OutOfMemoryError,
    SoundnessError,
    TraceError,
    TrainModeError,
    UnknownMethodError,
    UnsupportedNodeError,
)
from ..methods import label_option
from ..module import guard
from ..module.bounded_module import BoundedModule
from ..module.tracing import check_deterministic, check_mode
from .outcomes import Problem, Watched, distrust, finite, judge, margins_to, note, refuted, say, see
from .radii import add_radii
from .results_file import Record

_logger = logging.getLogger(__name__)

# Wrong arguments: these errors do not depend on the sample, so they stop the run.
_ARGUMENTS = (EstimateError, InvalidInputError, OptionError, TrainModeError, UnknownMethodError)
# Errors of the model: they stop the run, unless a batch was bounded before. Any other error is that of one sample.
_OF_THE_RUN = (TraceError, UnsupportedNodeError)


class Certifier:
    """Bounds and attacks a copy of a model, batch by batch; an error of one sample does not stop the others.

    `certify` makes one for a data set, and `lirpa_ext.training.CertifiedClassifier` one for each validation.

    Args:
        model: Classifier, (B, ...) -> (B, classes). It is copied, not changed.
        method: Any method of `BoundedModule.compute_bounds`.
        options: Options of the method.
        norm: p of the lp ball.
        data_range: Lower and upper end of the data range; None for no limit.
        dtype: torch.float32 or torch.float64, of the whole computation.
        device: Where to compute; None for the model's device.

    Attributes:
        bounded: Graph of the copy, made at the first bound and after every error.
        most: Largest number of samples that fit into memory together; None until a batch did not fit.
        fallbacks: Nodes (name: class) of the last bound that the engine's interval rule bounded for want of a rule.
        worked: Whether a batch was bounded.

    Raises:
        InvalidInputError: The model is no plain torch module, or dtype, device, norm or data range is not possible.
        TraceError: The model cannot be copied, or draws random numbers.
        TrainModeError: A batch norm is in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        options: dict[str, Any],
        norm: float,
        data_range: tuple[float | Tensor | None, float | Tensor | None],
        dtype: torch.dtype,
        device: str | torch.device | None,
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, engine.EngineBoundedModule):
            raise InvalidInputError(f"model must be a plain torch module, got {type(model).__name__}")
        if dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        PerturbationLpNorm(0.0, norm, *data_range)  # checks norm and range
        check_mode(model)
        check_deterministic(model)
        first = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
        try:
            duplicate = copy.deepcopy(model)
        except Exception as error:  # whatever a user's model raises
            raise TraceError(
                f"{type(model).__name__} cannot be copied: {_describe(error)}. The hook-based weight_norm and "
                "spectral_norm of torch are not supported; use those of torch.nn.utils.parametrizations"
            ) from error
        try:
            self.device = first.device if device is None else torch.device(device)
            self.model = duplicate.to(self.device, dtype).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:  # torch's for a device that is not there
            raise InvalidInputError(f"the model cannot go to {device} as {dtype}: {_describe(error)}") from error
        self.method, self.options, self.norm, self.data_range, self.dtype = (
            method,
            options,
            norm,
            data_range,
            dtype,
        )
        self.other = torch.float32 if dtype == torch.float64 else torch.float64
        self.bounded: BoundedModule | None = None
        self.most: int | None = None  # samples that fit into memory together, once that was met
        self._other: nn.Module | None = None
        self.fallbacks: dict[str, str] = {}
        self.worked = False

    def place(self, x: Tensor) -> Tensor:
        """Inputs x, (B, ...), moved to the certifier's device and dtype."""
        placed = x.detach().to(self.device, self.dtype)
        return placed.clone() if placed.is_inference() else placed

    def logits(self, x: Tensor) -> Tensor:
        """Logits of x, (B, classes), without gradient."""
        with torch.no_grad():
            return self.model(x)

    def count_classes(self, x: Tensor) -> int:
        """Number of classes of the model, found by running it on one input.

        Args:
            x: One input, (1, ...).

        Raises:
            InvalidInputError: The model fails on x, or its output is not of shape (1, classes).
        """
        try:
            logits = self.logits(self.place(x))
        except Exception as error:  # whatever a user's model raises
            raise InvalidInputError(
                f"the model fails on an input of shape {tuple(x.shape)} in {self.dtype}: {_describe(error)}. "
                "Check the shape; a model that makes float32 tensors itself needs dtype=torch.float32"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
            raise InvalidInputError("the model must return one tensor of logits, (B, classes)")
        return logits.shape[1]

    def certify(
        self,
        batch: range,
        x: Tensor,
        y: Tensor,
        levels: list[float],
        attack: Attack | None,
        seed: int,
        tolerance: float | None = None,
    ) -> list[Record]:
        """Bound and attack the samples of a batch at every eps.

        Args:
            batch: Indices of the samples in the data set.
            x: Inputs, (B, ...).
            y: Labels, (B,).
            levels: Every eps, ascending.
            attack: Attack on the correctly classified samples; None for no attack.
            seed: Seed of the attack.
            tolerance: Width at which the search for the certified radius stops; None for no search.

        Returns:
            One record for each sample, see `lirpa_ext.certification.results_file`.

        Raises:
            EstimateError, InvalidInputError, OptionError, TrainModeError, UnknownMethodError: Wrong arguments.
            OutOfMemoryError: One sample alone does not fit into memory.
            TraceError, UnsupportedNodeError: The model cannot be bounded, and no batch was bounded before. After a
                batch was bounded, these errors are put into the records.
        """

        def clean(x: Tensor, y: Tensor) -> Tensor:
            logits = self.logits(x)
            return torch.cat([logits.argmax(1, keepdim=True).to(x), margins_to(logits, y)], 1)

        def attacked(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
            watched = Watched(self.model, y)
            found = attack(watched, x, y, self._set(eps), torch.Generator().manual_seed(seed))  # type: ignore[misc]
            return torch.cat([watched.least, found.masked.unsqueeze(1).to(watched.least)], 1)

        most = self.most
        values, problems = self.by_sample(clean, x, y)
        prediction, margin = values[:, 0], values[:, 1:].amin(1)
        seen = values[:, 1:].repeat(len(levels), 1, 1)  # least value of each row at points of the set
        lower = torch.full_like(seen, math.nan)
        masked = torch.zeros(len(levels), len(x), dtype=torch.bool, device=x.device)
        messages = [list(problems) for _ in levels]
        defined, correct = (chosen.nonzero().flatten() for chosen in (margin.isfinite(), margin > 0))
        noise = torch.full_like(margin, math.nan, dtype=torch.float64)  # with NaN, `refuted` accepts no bound
        if len(defined):
            found, failed = self.by_sample(self._noise, x[defined])
            noise[defined] = found[:, 0]
            for some_messages in messages:
                note(some_messages, defined, failed)
        for k, level in enumerate(levels):
            eps = x.new_full((len(x),), level)
            seen[k] = seen[max(k - 1, 0)]  # points of the ball with a smaller eps are in this ball too
            if len(defined):
                lower[k, defined], failed = self.lower(x[defined], y[defined], eps[defined])
                note(messages[k], defined, failed)
            if attack is not None and len(correct):
                found, failed = self.by_sample(attacked, x[correct], y[correct], eps[correct])
                see(seen[k], messages[k], correct, found[:, :-1], failed)
                masked[k, correct] = found[:, -1] == 1
            # Bounds that would certify a sample are also compared with values at corners of the set.
            promising = (lower[k].amin(1) > 0) & torch.tensor([not why for why in messages[k]], device=x.device)
            hopeful = promising.nonzero().flatten()
            if len(hopeful):
                some = (part[hopeful] for part in (x, y, eps, lower[k]))
                found, failed = self.by_sample(self.at_corners, *some)
                see(seen[k], messages[k], hopeful, found, failed)
        wrong = refuted(lower, seen, noise)
        records: list[Record] = []
        for i, index in enumerate(batch):
            why = [some[i] for some in messages]
            record = {
                "index": index,
                "label": int(y[i]),
                "prediction": None if margin[i].isnan() else int(prediction[i]),
                "clean_margin": finite(margin[i]),
                "radius": None,
                "message": "",
                "levels": judge(
                    levels, seen[:, i].amin(1).tolist(), lower[:, i].amin(1).tolist(), why, masked[:, i].tolist()
                ),
            }
            records.append(record)
            defect = next((problem for problem in why if problem and problem.defect), None)
            for k, row in wrong[:, i].nonzero().tolist():
                if defect is None and seen[k, i].isfinite().all():
                    defect = self.defect(index, int(y[i]), row, levels[k], lower[k, i, row], seen[k, i, row])
            if defect is not None:
                distrust(record, defect)
        if tolerance is not None:
            add_radii(self, records, x, y, torch.cat([values[None, :, 1:], seen]), noise, tolerance)
        if self.most != most:
            for record in records:
                say(record, f"out of memory with more samples at once: bounded by at most {self.most}")
        return records

    def _set(self, eps: Tensor) -> PerturbationLpNorm:
        return PerturbationLpNorm(eps, self.norm, *self.data_range)

    def _noise(self, x: Tensor) -> Tensor:
        """Scale of the rounding errors of the logits (`guard.noise`), (B, 1), float64."""
        if self._other is None:
            self._other = copy.deepcopy(self.model).to(self.other)
        return guard.noise(self.model, lambda x: self._other(x.to(self.other)), x).unsqueeze(1)  # type: ignore[misc]

    def at_corners(self, x: Tensor, y: Tensor, eps: Tensor, lower: Tensor) -> Tensor:
        """Least margins at points of the set that are likely to refute a wrong bound.

        Args:
            x: Inputs, (B, ...).
            y: Labels, (B,).
            eps: Radius of each sample, (B,).
            lower: Lower bounds of the margins z_y - z_j, (B, S) or (B, 1); S = classes - 1.

        Returns:
            Least value of each margin over the points, (B, S).
        """
        watched = Watched(self.model, y)
        clean = margins_to(self.logits(x), y)
        rows = guard.closest(clean, lower.expand_as(clean))
        for points in guard.extremes(lambda x: margins_to(self.model(x), y), x, self._set(eps), rows, seed=0):
            with torch.no_grad():
                watched(points)
        return watched.least

    def lower(self, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, list[Problem | None]]:
        """Lower bounds on all margins z_y - z_j over each sample's set.

        Args:
            x: Inputs, (B, ...).
            y: Labels, (B,).
            eps: Radius of each sample, (B,).

        Returns:
            Lower bounds, (B, classes - 1) or (B, 1), NaN where bounding failed; and for each sample its problem, or
            None.

        Raises:
            LirpaExtError: As `certify`.
        """
        lower, problems = self.by_sample(self._bound, x, y, eps, fatal=() if self.worked else _OF_THE_RUN)
        undefined = lower.isnan().any(1).tolist()
        return lower, [
            problem or (Problem(f"method {self.method!r} gave NaN as a bound") if nan else None)
            for problem, nan in zip(problems, undefined, strict=True)
        ]

    def _bound(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        try:
            if self.bounded is None:
                self.bounded = BoundedModule(self.model, x)
            rows = margin_rows(y, self.bounded.final_node().output_shape[-1], self.dtype)
            options = label_option(self.method, y) | self.options
            ball = BoundedTensor(x, self._set(eps))
            lower, _ = self.bounded.compute_bounds((ball,), C=rows, method=self.method, bound_upper=False, **options)
        except BaseException:
            self.bounded = None  # a graph that failed half-way may hold anything
            raise
        if lower.shape not in (rows.shape[:2], (len(x), 1)):
            raise SoundnessError(
                f"method {self.method!r} gave bounds of shape {tuple(lower.shape)} for {tuple(rows.shape[:2])} rows"
            )
        self.worked = True
        self.fallbacks = {} if self.bounded.last_result is None else self.bounded.last_result.fallbacks
        return lower.detach()

    def by_sample(
        self, function: Callable[..., Tensor], *tensors: Tensor, fatal: tuple[type[Exception], ...] = ()
    ) -> tuple[Tensor, list[Problem | None]]:
        """Call a function on a batch; if it raises, call it on each sample alone to find those that fail.

        A batch that does not fit into memory is halved, and later calls keep the smaller size. A `SoundnessError` of
        the batch that no sample raises alone is a problem of all samples.

        Args:
            function: Takes the tensors and gives (B, columns).
            *tensors: Tensors of B samples each.
            fatal: Errors that are raised again, besides those of wrong arguments.

        Returns:
            Values, (B, columns), NaN for a sample that fails; and for each sample its problem, or None.

        Raises:
            OutOfMemoryError: One sample alone does not fit into memory.
        """
        batch = len(tensors[0])
        whole = Problem("")
        size = min(batch, self.most or batch)
        if size == batch:
            try:
                return function(*tensors), [None] * batch
            except Exception as error:  # whatever a model or a method raises
                if is_out_of_memory(error):
                    if batch == 1:
                        raise OutOfMemoryError(
                            f"one sample alone runs out of memory with method {self.method!r}: {_describe(error)}. "
                            "Take a cheaper method"
                        ) from error
                    self.most = size = batch // 2
                    _logger.warning("out of memory with %d samples at once; going on with %d", batch, size)
                elif isinstance(error, _ARGUMENTS + fatal):
                    raise
                else:
                    wrong = isinstance(error, SoundnessError)
                    whole, size = Problem(f"unsound: {error}" if wrong else _describe(error), wrong), 1
                    _logger.warning("%s; %d samples in the batch", whole.text, batch)
                    if batch == 1:
                        return tensors[0].new_full((1, 1), math.nan), [whole]
        parts = [
            self.by_sample(function, *(tensor[i : i + size] for tensor in tensors), fatal=fatal)
            for i in range(0, batch, size)
        ]
        problems = [problem for _, some in parts for problem in some]
        if whole.defect and not any(problem and problem.defect for problem in problems):
            problems = [whole] * batch
        columns = max(values.shape[1] for values, _ in parts)
        return torch.cat([values.expand(-1, columns) for values, _ in parts]), problems

    def defect(
        self, index: int, label: int, row: int, eps: float, bound: Tensor | float, value: Tensor | float
    ) -> Problem:
        """The problem of a lower bound that is above a value of the network; the message is logged as an error.

        Args:
            index: Index of the sample in the data set.
            label: Its label.
            row: Row of the margin, 0 to classes - 2.
            eps: Radius of the set.
            bound: The refuted lower bound.
            value: Value of the margin at a point of the set.
        """
        other = row + (row >= label)
        where = f"sample {index} at eps {eps:.6g}"
        text = guard.refuted(self.method, f"row {row}, z_{label} - z_{other},", where, float(bound), float(value))
        _logger.error(text)
        return Problem(text, defect=True)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
