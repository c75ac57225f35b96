"""`certify`: clean, PGD and verified accuracy over a data set, and the certified radius of each sample."""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import engine
from .._version import __version__
from ..attacks import APGD, Attack, make_attack
from ..data import gather
from ..domain.lp_ball import check_eps
from ..domain.specifications import check_labels
from ..errors import EstimateError, InvalidInputError
from ..methods import check_options, engine_methods, find_method
from .certifier import Certifier
from .identity import hash_tensors, model_hash, outputs
from .report import Report
from .results_file import PathLike, ResultsFile


@torch.inference_mode(False)  # whatever the caller's mode: bounds and attacks need gradients
def certify(
    model: nn.Module,
    data: Any,
    eps: float | Sequence[float] | Tensor,
    norm: float = 2,
    method: str = "bcp",
    *,
    options: dict[str, Any] | None = None,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 64,
    attack: Attack | str | None = "apgd",
    radius: bool | float = 1e-3,
    results: PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    device: str | torch.device | None = None,
    seed: int = 0,
    **former: Any,
) -> Report:
    """Certify each sample at each eps: is all of {x' : ||x' - x||_p <= eps} classified as its label?

    A sample is *certified* where the method's lower bounds of all z_y - z_j are positive (not 0, not NaN),
    *attacked* where the attack found a point of the set without a positive margin (or the sample itself is
    misclassified), *unknown* where neither happened, and in *error* where the model or the method raised an error, gave
    NaN, or a point refuted a bound. A certificate at one eps counts at smaller eps too, an attack at larger eps.

    Args:
        model: Classifier, (B, ...) -> (B, classes). It is copied, not changed; normalize inside of it.
        data: (x, y) tensors, a Dataset, or a DataLoader. Held in memory.
        eps: One radius or several, in units of the input.
        norm: p of the lp ball, 1 <= p <= inf, default 2.
        method: Any method of `BoundedModule.compute_bounds`, default "bcp".
        options: Options of the method, default none.
        x_L: Lower end of the data range, a number or a tensor that broadcasts to a sample. Default: no range.
        x_U: Upper end of the data range, likewise.
        dtype: torch.float32 or torch.float64, of the whole computation; default float64.
        batch_size: Samples at a time, default 64. A batch size of the model (`ImportedModel.batch_size`) replaces it.
        attack: An attack of `lirpa_ext.attacks`, or its name; None for none. Default "apgd": Auto-PGD, two runs of 20
            steps, on cross-entropy and on the margin.
        radius: Width at which the search for the certified radius, the largest eps that the method certifies, stops: in
            units of eps (times the largest eps if that is below 1), default 1e-3. False for no search.
        results: File to which each result is written as soon as it is known, and from which a stopped run is resumed.
            The file identifies its model by a hash of the traced graph with all tensors, and by outputs at a few
            samples. It is locked while `certify` runs.
        resume: Go on with an existing results file, default True. False renames that file and starts anew.
        progress: Show a progress bar, default True.
        device: Where to compute, default where the model is.
        seed: Seed of the attack's random starts, default 0.
        **former: The deprecated arguments `attack_steps`, `attack_restarts` and `radius_tolerance`.

    Returns:
        The report: records, accuracies, files and plot.

    Raises:
        UnknownMethodError, OptionError, EstimateError: The method or one of its options is wrong; raised before any
            work.
        InvalidInputError: eps, data range, images or labels are wrong; raised before any work.
        DataError: The data set is empty or unreadable.
        TraceError, TrainModeError, UnsupportedNodeError: The model cannot be bounded.
        ResultsError: The results file is corrupt, of another run, or in use by another process.
    """
    if former:
        attack, radius = _formerly(attack, radius, former)
    options = dict(options or {})
    _check_method(method, options)
    task = _Task(
        _check_levels(eps), make_attack(attack) if isinstance(attack, str) else attack,
        1e-3 if radius is True else radius, getattr(model, "batch_size", None) or batch_size, seed,
    )  # fmt: skip
    task.check(norm)
    certifier = Certifier(model, method, options, norm, (x_L, x_U), dtype, device)
    x, y = gather(data)
    _check_images(x, dtype, x_L, x_U)
    classes = certifier.count_classes(x[:1])
    check_labels(y, classes)
    with ResultsFile(results, _meta(task, certifier, x, y, classes), resume) as file:
        done = len(file.records)
        with tqdm(total=len(x), initial=done, unit="sample", desc=f"certify {method}", disable=not progress) as bar:
            for batch in task.batches(len(x)):
                missing = [index for index in batch if index not in file.records]
                if missing:  # a batch that is partly in the file is computed whole, for the same starts and rounding
                    records = task.run(certifier, batch, x, y)
                    file.meta.setdefault("fallbacks", certifier.fallbacks)
                    file.append([record for record in records if record["index"] in missing])
                    bar.update(len(missing))
        return Report(file.meta, file.ordered())


@dataclass(frozen=True)
class _Task:
    """What is done with each batch.

    Attributes:
        levels: Every eps, ascending.
        attack: The attack, or None.
        radius: Width at which the search for the certified radius stops; False for no search.
        batch_size: Samples at a time.
        seed: Seed of the attack.
    """

    levels: list[float]
    attack: Attack | None
    radius: bool | float
    batch_size: int
    seed: int

    def check(self, norm: float) -> None:
        """Raise InvalidInputError for numbers out of range."""
        if self.batch_size < 1 or (self.radius is not False and not 0 < self.radius < math.inf):
            raise InvalidInputError("batch_size and radius must be positive; radius=False for no search")
        if self.attack is not None and norm == 1:
            raise InvalidInputError("attacks take lp balls with p > 1 only; pass attack=None with norm=1")
        if not isinstance(self.seed, int):
            raise InvalidInputError(f"seed must be a whole number, got {self.seed!r}")

    def batches(self, samples: int) -> list[range]:
        """Indices of the samples of each batch."""
        return [range(k, min(k + self.batch_size, samples)) for k in range(0, samples, self.batch_size)]

    def run(self, certifier: Certifier, batch: range, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
        """Records of one batch of the samples."""
        inputs, labels = x[batch.start : batch.stop], y[batch.start : batch.stop].long()
        seed = (self.seed * 2**32 + batch.start) % 2**64
        return certifier.certify(
            batch, certifier.place(inputs), labels.to(certifier.device), self.levels, self.attack, seed,
            self.radius or None,
        )  # fmt: skip


def _meta(task: _Task, certifier: Certifier, x: Tensor, y: Tensor, classes: int) -> dict[str, Any]:
    """Head of the results: what a resumed run must share, and what a reader wants to know."""
    x_L, x_U = certifier.data_range
    return {
        "package": "lirpa-ext",
        "package_version": __version__,
        "engine": "auto_LiRPA",
        "engine_version": engine.engine_version(),
        "torch_version": torch.__version__,
        "method": certifier.method,
        "options": {name: _plain(value) for name, value in certifier.options.items()},
        "norm": _plain(certifier.norm),
        "eps": task.levels,
        "x_L": _plain(x_L),
        "x_U": _plain(x_U),
        "dtype": str(certifier.dtype).removeprefix("torch."),
        "model": type(certifier.model).__name__,
        "model_hash": model_hash(certifier.model, certifier.place(x[:1])),
        "outputs": outputs(certifier.model, x, certifier.place),
        "data_hash": hash_tensors([("x", x), ("y", y)]),
        "samples": len(x),
        "classes": classes,
        "attack": None if task.attack is None else {"name": type(task.attack).__name__, **vars(task.attack)},
        "radius": task.radius is not False,
        "radius_tolerance": task.radius or 1e-3,
        "seed": task.seed,
        "batch_size": task.batch_size,
        "device": str(certifier.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _formerly(
    attack: Attack | str | None, radius: bool | float, former: dict[str, Any]
) -> tuple[Attack | str | None, bool | float]:
    """Translate the deprecated arguments of `certify` into `attack` and `radius`."""
    unknown = set(former) - {"attack_steps", "attack_restarts", "radius_tolerance"}
    if unknown:
        raise TypeError(f"certify() got an unexpected keyword argument {min(unknown)!r}")
    warnings.warn(
        f"{', '.join(former)}: pass attack=APGD(steps, restarts) or attack=None, and radius=TOLERANCE or radius=False",
        DeprecationWarning,
        stacklevel=4,
    )
    steps, restarts = former.get("attack_steps", 20), former.get("attack_restarts", 2)
    tolerance = former.get("radius_tolerance", 1e-3)
    if not 0 < tolerance < math.inf or steps < 0:
        raise InvalidInputError("radius_tolerance must be positive, attack_steps not negative")
    if "attack_steps" in former or "attack_restarts" in former:
        attack = APGD(steps, restarts) if steps else None
    return attack, tolerance if radius is True or radius == 1e-3 else radius


def _check_method(method: str, options: dict[str, Any]) -> None:
    if not isinstance(method, str) or method.lower() not in engine.ENGINE_METHODS:
        check_options(method, find_method(method), options)
    else:
        engine_methods.named((), options)
    if options.get("projections") is not None:
        raise EstimateError("projections give estimates, which certify nothing; leave them out")
    if options.get("norms", "bound") != "bound":
        raise EstimateError(f"norms={options['norms']!r} gives estimates, which certify nothing; leave it out")


def _check_levels(eps: float | Sequence[float] | Tensor) -> list[float]:
    try:
        values = torch.as_tensor(eps, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"eps must be a number or a list of numbers, got {eps!r}") from error
    if values.dim() > 1 or values.numel() == 0:
        raise InvalidInputError(f"eps must be a number or a list of numbers, got shape {tuple(values.shape)}")
    check_eps(values)
    return sorted(set(values.reshape(-1).tolist()))


def _check_images(x: Tensor, dtype: torch.dtype, x_L: float | Tensor | None, x_U: float | Tensor | None) -> None:
    """Raise InvalidInputError, naming the first bad sample, unless all inputs are finite and in the data range."""
    samples = x.to(dtype)
    bad = ~torch.isfinite(samples)
    if bad.any():
        raise InvalidInputError(f"inputs have NaN or infinite entries, the first in sample {int(bad.nonzero()[0, 0])}")
    for end, beyond in ((x_L, torch.lt), (x_U, torch.gt)):
        if end is None:
            continue
        try:
            bad |= beyond(samples, torch.as_tensor(end).to(samples).expand_as(samples[:1]))
        except RuntimeError as error:
            raise InvalidInputError(f"the data range must broadcast to one sample: {error}") from error
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise InvalidInputError(
            f"inputs leave the data range [{_plain(x_L)}, {_plain(x_U)}], first sample {first}, spanning "
            f"[{samples[first].min():.6g}, {samples[first].max():.6g}]. Scale the data, or normalize in the model"
        )


def _plain(value: Any) -> Any:
    """A value that JSON can hold; a tensor of more than 16 numbers becomes its hash."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return value.item()
        return value.tolist() if value.numel() <= 16 else hash_tensors([("", value)])
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
