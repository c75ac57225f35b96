"""The contract suite of the engine's bounds: every bound of a case is attacked, and what holds goes on the list."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from catalogue import Case
from soundness import Extremes, assert_contains, extremes, generator
from torch import Tensor

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.engine.configuration import configuration, kind
from lirpa_ext.errors import LirpaExtError
from lirpa_ext.methods import BoundOptions

# The methods of each family, and whether they are attacked with rows of the outputs (True) or on the outputs (False).
METHODS = {
    "interval": (("IBP", True), ("IBP", False)),
    "backward": (("CROWN-IBP", True), ("CROWN", False), ("alpha-CROWN", True)),
    "forward": (("forward", False), ("forward+backward", True)),
}
OPTIONS = {"optimize_bound_args": {"iteration": 3}, "verbosity": 0}
_RELAXATION_TRIALS = 6
_BUILTIN = ("auto_LiRPA", "lirpa_ext")


class Observation(NamedTuple):
    """What became of a bound of a subject.

    Attributes:
        family: Family of the bound.
        kind: Class of the node.
        configuration: Its configuration.
        wrong: What was wrong with it, or "".
    """

    family: str
    kind: str
    configuration: str
    wrong: str


def sets(x: Tensor) -> list[PerturbationLpNorm]:
    """Perturbation sets of every norm, small and large, with an eps for each sample, cut to a range."""
    each = torch.linspace(0.0, 0.6, len(x), dtype=x.dtype)
    low, high = float(x.min()), float(x.max())
    return [
        PerturbationLpNorm(0.1, math.inf),
        PerturbationLpNorm(0.3, 2),
        PerturbationLpNorm(each, 2),
        PerturbationLpNorm(1.0, math.inf, x_L=low, x_U=high),
        PerturbationLpNorm(0.8, 1),
        PerturbationLpNorm(each, math.inf),
        PerturbationLpNorm(0.5, 3),
        PerturbationLpNorm(1.5, 2, x_L=low, x_U=high),
    ]


def observe(case: Case, number: int) -> list[Observation]:
    """All observations of a case, whose number chooses its sets."""
    families = ("interval",) if case.alone else tuple(METHODS)
    torch.manual_seed(number)
    model = case.build().double().eval()
    found: list[Observation] = []
    for batch in (3, 1):
        x = torch.rand(batch, *case.shape, dtype=torch.float64) - 0.3
        chosen = sets(x)[number % 3 :: 3] if batch == 3 else sets(x)[number % 8 : number % 8 + 1]
        searches: dict[PerturbationLpNorm, list[tuple[Tensor | None, Extremes]]] = {}
        for mode in ("patches", "matrix") if len(case.shape) == 3 and not case.alone else ("matrix",):
            try:
                with quiet():
                    graph = BoundedModule(model, x, bound_opts=OPTIONS | {"conv_mode": mode})
            except LirpaExtError:
                return []
            for perturbation in chosen:
                ball = BoundedTensor(x, perturbation)
                rows = torch.randn(batch, 4, graph.final_node().output_shape[1], generator=generator(1), dtype=x.dtype)
                if perturbation not in searches:
                    searches[perturbation] = [(C, extremes(model, x, perturbation, C, 30, 5)) for C in (rows, None)]
                for family, methods in METHODS.items():
                    if family in families:
                        engine.set_input(graph, ball)
                        about = _about(graph, case.subject, "" if family == "interval" else mode)
                        wrong = _attacked(graph, searches[perturbation], ball, methods)
                        found += [Observation(family, case.subject, what, wrong) for what in about]
    found += _relaxations(graph, x, case.subject, number)
    return found


def _about(graph: Any, subject: str, mode: str) -> list[str]:
    """Configurations of the subject's nodes."""
    nodes = engine.ancestors_in_order(graph.final_node())
    return [configuration(node, mode) for node in nodes if kind(node) == subject]


def _attacked(
    graph: Any, found: list[tuple[Tensor | None, Extremes]], ball: Tensor, methods: tuple[tuple[str, bool], ...]
) -> str:
    """What is wrong with the bounds of some methods, "" if nothing; that the engine fails is told as "error: ..."."""
    failure = ""
    held = False
    for method, of_rows in methods:
        C, search = found[0 if of_rows else 1]
        try:
            with quiet():
                graph._set_inputs((ball,))
                bounds = graph._run_engine(None, method, BoundOptions(method, C), {})
            lower, upper = bounds[0].detach(), bounds[1].detach()
            assert (lower <= upper + 1e-9 * (1 + search.scale)).all(), "lower above upper"
            assert_contains((lower, upper), search)
            held = True
        except AssertionError as error:
            return f"{method}: {str(error)[:60]}"
        except LirpaExtError as error:
            failure = failure or f"error: {method}: {str(error)[:160]}"
    return "" if held else failure


def _relaxations(graph: Any, x: Tensor, subject: str, number: int) -> list[Observation]:
    """The linear relaxation of each subject alone: rows times the node against what it gives, on boxes at random."""
    source = generator(number)
    final = graph.final_node()
    order = engine.ancestors_in_order(final)
    engine.set_input(graph, BoundedTensor(x, PerturbationLpNorm(0.1)))
    found = []
    for node in [node for node in order if kind(node) == subject and node.perturbed]:
        if not type(node).__module__.startswith(_BUILTIN[0]) and subject not in ("BoundRelu", "BoundLinear"):
            continue
        wrong = ""
        for trial in range(_RELAXATION_TRIALS):
            wrong = wrong or _relaxed(graph, node, final, order, source, (0.05, 1.0, 4.0)[trial % 3])
        found.append(Observation("relaxation", subject, configuration(node), wrong))
    engine.free_graphs(graph)
    return found


def _relaxed(graph: Any, node: Any, final: Any, order: list[Any], source: torch.Generator, size: float) -> str:
    values = {other.name: graph.get_forward_value(other) for other in order}
    boxes = {}
    for other in order:
        center = values[other.name]
        width = size * torch.rand(center.shape, generator=source, dtype=torch.float64) if other.perturbed else 0.0
        boxes[other.name] = center - width, center + width
        engine.set_bounds(other, *boxes[other.name])
    rows = torch.randn(3, *values[node.name].shape, generator=source, dtype=torch.float64)
    try:
        with quiet(), graph._computing():
            pairs, bias, _ = engine.bound_backward(node, rows, final)
    except Exception as error:  # whatever it raises, it gives no bound
        return f"error: {type(error).__name__}: {str(error)[:100]}"
    least = None
    for _ in range(60):
        points = []
        for parent in node.inputs:
            low, high = boxes[parent.name]
            share = torch.rand(values[parent.name].shape, generator=source, dtype=torch.float64)
            share = share.round() if torch.rand((), generator=source) < 0.4 else share
            points.append(low + share * (high - low) if parent.perturbed else values[parent.name])
        if len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]:
            points[1] = points[0]
        value = (rows * node.forward(*points)).flatten(2).sum(2)
        try:
            for (passed, _), point in zip(pairs, points, strict=False):
                if passed is not None:
                    value = value - (passed * point).flatten(2).sum(2)
            value = value - torch.as_tensor(bias)
        except (RuntimeError, TypeError) as error:
            return f"shape: {type(error).__name__}"
        if value.shape != rows.shape[:2] or not value.isfinite().all():
            return "not finite, or of a wrong shape"
        least = value if least is None else torch.minimum(least, value)
    assert least is not None
    return (
        "" if bool((least >= -1e-9 * (1 + float(rows.abs().sum()))).all()) else f"violated by {-float(least.min()):.2g}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The engine prints and warns as it works."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
