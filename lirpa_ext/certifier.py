"""The work behind `certify`, one batch at a time: bounds, attacks, outcomes and certified radii."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import engine
from .attacks import Attack
from .engine import BoundedTensor
from .errors import (
    EstimateError,
    InvalidInputError,
    OptionError,
    TraceError,
    TrainModeError,
    UnknownMethodError,
    UnsupportedNodeError,
)
from .methods import label_option
from .module import BoundedModule
from .perturbation import PerturbationLpNorm
from .report import Record
from .specifications import margin_rows, margins
from .tracing import check_mode

_logger = logging.getLogger(__name__)

# Errors that every sample would meet; anything else is the error of one sample.
_OF_THE_RUN = (
    EstimateError, OptionError, TraceError, TrainModeError, UnknownMethodError, UnsupportedNodeError,
)  # fmt: skip
# The search for a radius gives up here, in units of the largest eps asked for (a constant classifier).
_LARGEST_GROWTH = 2.0**20


class Certifier:
    """A copy of a model, with what bounds and attacks it one batch at a time; no single sample stops it."""

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
        self.bounded: BoundedModule | None = None
        self.fallbacks: dict[str, str] = {}
        self.worked = False

    def place(self, x: Tensor) -> Tensor:
        """Inputs on the device, in the dtype."""
        return x.detach().to(self.device, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        with torch.no_grad():
            return self.model(x)

    def count_classes(self, x: Tensor) -> int:
        """Number of classes, if the model takes such inputs."""
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
        self, batch: range, x: Tensor, y: Tensor, levels: list[float], attack: Attack | None, seed: int
    ) -> list[Record]:
        """Records of a batch, without radii.

        Args:
            batch: Indices of the samples.
            x: Inputs, (B, ...).
            y: Labels, (B,).
            levels: Every eps, ascending.
            attack: Or None.
            seed: Of the attack.
        """

        def clean(x: Tensor, y: Tensor) -> Tensor:
            logits = self.logits(x)
            return torch.stack([margins(logits, y), logits.argmax(1).to(x), logits.abs().amax(1)], dim=1)

        def attacked(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return attack(self.model, x, y, self._set(eps), generator).margins.unsqueeze(1)  # type: ignore[misc]

        values, problems = _by_sample(clean, x, y, columns=3)
        margin, prediction, scale = values.unbind(1)
        defined, correct = (chosen.nonzero().flatten() for chosen in (margin.isfinite(), margin > 0))
        found = margin.repeat(len(levels), 1)  # the clean input is a point of every set
        lower = torch.full_like(found, math.nan)
        messages = [list(problems) for _ in levels]
        for k, level in enumerate(levels):
            eps = x.new_full((len(x),), level)
            if len(defined):
                lower[k, defined], failed = self._lower(x[defined], y[defined], eps[defined])
                _note(messages[k], defined, failed)
            if attack is not None and len(correct):
                some, failed = _by_sample(attacked, x[correct], y[correct], eps[correct])
                # What was found in a smaller set is in this one too.
                found[k, correct] = torch.fmin(found[max(k - 1, 0), correct], some[:, 0])
                _note(messages[k], correct, failed)
        slack = torch.finfo(self.dtype).eps ** 0.5 * (1 + scale)
        return [
            {
                "index": index,
                "label": int(y[i]),
                "prediction": None if margin[i].isnan() else int(prediction[i]),
                "clean_margin": _finite(margin[i]),
                "radius": None,
                "message": "",
                "levels": _judge(
                    levels,
                    found[:, i].tolist(),
                    lower[:, i].tolist(),
                    [why[i] for why in messages],
                    float(slack[i]),
                ),
            }
            for i, index in enumerate(batch)
        ]

    def add_radii(self, records: list[Record], x: Tensor, y: Tensor, tolerance: float) -> None:
        """Put the largest eps that is certified into each record, by bisection on all samples at once.

        Only an eps that was certified itself is reported, so nothing is assumed of the method. 0 for a sample
        that is misclassified or certified nowhere, None for one that is certified nowhere due to an error.
        """
        defined = [i for i, record in enumerate(records) if record["clean_margin"] is not None]
        records, x, y = [records[i] for i in defined], x[defined], y[defined]
        if not records:
            return
        levels = [level["eps"] for level in records[0]["levels"]]
        width = tolerance * min(1.0, max(levels) or 1.0)
        start, limit = max(levels) or tolerance, _LARGEST_GROWTH * (max(levels) or 1.0)
        certified, failed = x.new_zeros(len(x)), x.new_zeros(len(x))
        failing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i, record in enumerate(records):
            status = {level["eps"]: level["status"] for level in record["levels"]}
            failing[i] = set(status.values()) == {"error"}
            certified[i] = max((eps for eps in levels if status[eps] == "certified"), default=0.0)
            failed[i] = min((eps for eps in levels if status[eps] in ("attacked", "unknown")), default=math.inf)
            if record["clean_margin"] <= 0:
                failed[i], failing[i] = 0.0, False
        while True:
            grown = torch.where(certified > 0, 2 * certified, start)
            trial = torch.where(failed < math.inf, (certified + failed) / 2, grown)
            between = (certified < trial) & (trial < failed)  # fails where rounding leaves no number between
            active = ~failing & between & (failed - certified > width) & (certified < limit)
            if not active.any():
                break
            lower, why = self._lower(x, y, torch.where(active, trial, certified))
            for i in active.nonzero().flatten().tolist():
                if why[i]:
                    failing[i] = True
                    records[i]["message"] = f"radius search stopped at eps {float(trial[i]):.6g}: {why[i]}"
                elif lower[i] > 0:
                    certified[i] = trial[i]
                else:
                    failed[i] = trial[i]
        for i, record in enumerate(records):
            record["radius"] = None if failing[i] and certified[i] == 0 else float(certified[i])

    def _set(self, eps: Tensor) -> PerturbationLpNorm:
        return PerturbationLpNorm(eps, self.norm, *self.data_range)

    def _lower(self, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, list[str]]:
        """Lower bound on the margin of each sample over its set, (B,), and what went wrong with it or ""."""
        lower, messages = _by_sample(self._bound, x, y, eps, fatal=() if self.worked else _OF_THE_RUN)
        lower = lower[:, 0]
        undefined = lower.isnan().tolist()
        return lower, [
            message or (f"method {self.method!r} gave NaN as a bound" if nan else "")
            for message, nan in zip(messages, undefined, strict=True)
        ]

    def _bound(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        try:
            if self.bounded is None:
                self.bounded = BoundedModule(self.model, x)
            rows = margin_rows(y, self.bounded.final_node().output_shape[-1], self.dtype)
            lower, _ = self.bounded.compute_bounds(
                x=(BoundedTensor(x, self._set(eps)),),
                C=rows,
                method=self.method,
                bound_upper=False,
                **label_option(self.method, y) | self.options,
            )
        except BaseException:
            self.bounded = None  # a graph that failed half-way may hold anything
            raise
        self.worked = True
        self.fallbacks = self.bounded.fallbacks
        return lower.detach().amin(1, keepdim=True)


def _by_sample(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    columns: int = 1,
    fatal: tuple[type[Exception], ...] = (),
) -> tuple[Tensor, list[str]]:
    """function(*tensors), (B, columns); if it raises, sample by sample, with NaN and a message for failures."""
    try:
        return function(*tensors), [""] * len(tensors[0])
    except fatal:
        raise
    except Exception as error:  # whatever a model or a method raises
        _logger.warning("%s; %d samples in the batch", _describe(error), len(tensors[0]))
        if len(tensors[0]) == 1:
            return tensors[0].new_full((1, columns), math.nan), [_describe(error)]
    parts = [
        _by_sample(function, *(tensor[i : i + 1] for tensor in tensors), columns=columns, fatal=fatal)
        for i in range(len(tensors[0]))
    ]
    return torch.cat([values for values, _ in parts]), [message for _, messages in parts for message in messages]


def _note(messages: list[str], samples: Tensor, failed: list[str]) -> None:
    """Enter the messages of some samples of a batch, the first of each sample."""
    for i, message in zip(samples.tolist(), failed, strict=True):
        messages[i] = messages[i] or message


def _judge(
    levels: list[float], found: list[float], lower: list[float], messages: list[str], slack: float
) -> list[dict[str, Any]]:
    """Outcome of one sample at each eps, from the largest down: a certificate holds at smaller eps too."""
    outcomes = []
    held = -math.inf
    for eps, attack, own, message in reversed(list(zip(levels, found, lower, messages, strict=True))):
        bound = own if message else max(own, held)
        if not message and not math.isfinite(attack):
            message = "the model's output is NaN or infinite"
        if not message and (bound > attack + slack or bound > 0 >= attack):
            message = f"unsound: lower bound {bound:.9g}, but a margin of {attack:.9g} at a point of the set"
            _logger.error("eps %g: %s. This is a defect of the method; please report it", eps, message)
        if not message:
            held = bound
        status = "error" if message else "certified" if bound > 0 else "attacked" if attack <= 0 else "unknown"
        outcomes.append(
            {
                "eps": eps,
                "status": status,
                "attack_margin": _finite(attack),
                "verified_margin": _finite(bound),
                "message": message,
            }
        )
    return outcomes[::-1]


def _finite(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
