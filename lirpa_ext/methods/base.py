"""What a bound method is, and the table of methods."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.norms import NormCache, PowerIteration
from ..domain.scalar_functions import scalar_function
from ..errors import InvalidInputError, OptionError, RegistrationError, UnknownMethodError
from ..extensions import add, load_extensions
from ..nodes.softmax import BoundStableLogSoftmax
from ..passes.ball_box import propagate
from ..rules import Context, State
from .relaxation import Relaxation

Bounds = tuple[Tensor | None, Tensor | None]  # lower and upper; None for a side that was not asked


@dataclass(frozen=True)
class BoundOptions:
    """What a call asks of a method, whichever it is: bounds of C f(x') for every x' in the perturbation set.

    Attributes:
        method: Name of the method, for messages.
        C: Specification rows, (B, S, outputs) or (1, S, outputs), or None for the outputs themselves.
        lower: Whether the lower side is asked.
        upper: Whether the upper side is asked.
    """

    method: str
    C: Tensor | None = None
    lower: bool = True
    upper: bool = True


@dataclass(frozen=True)
class BoundResult:
    """What a method found.

    Attributes:
        lower: Lower bounds, (B, S) or of the output's shape; None if that side was not asked.
        upper: Upper bounds, likewise.
        relaxation: Slopes of the activations, of the methods that choose some.
        fallbacks: Nodes (name: class) that the engine's interval rule bounded, there being none of ours.
        ended_rows: Nodes (name: why) at which coefficient rows ended early, at the minimum over the node's set.
        norms: Norm that each linear node was propagated with, by the name of its weight.
        estimate: Whether the norms are estimates, for training; the bounds are then no certificate.
        clean: f(x), (B, ...), where it was computed on the way.
    """

    lower: Tensor | None
    upper: Tensor | None
    relaxation: Relaxation | None = None
    fallbacks: dict[str, str] = field(default_factory=dict)
    ended_rows: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    estimate: bool = False
    clean: Tensor | None = None

    @property
    def sides(self) -> Bounds:
        """Lower and upper bounds."""
        return self.lower, self.upper

    def __iter__(self) -> Iterator[Tensor | None]:
        """``lower, upper = result``."""
        return iter(self.sides)

    def detached(self) -> BoundResult:
        """The same without autograd graphs."""
        lower, upper, clean = (t if t is None else t.detach() for t in (*self.sides, self.clean))
        return replace(self, lower=lower, upper=upper, clean=clean)


@dataclass(frozen=True)
class Graph:
    """A graph of the engine's, and the norms of its layers.

    Attributes:
        module: The graph, with the input set on it.
        cache: Norm bounds of its layers.
        power_iterations: Their power iterations, which estimate norms in training.
        training: Whether the model is in training mode, where the power iterations move.
    """

    module: nn.Module
    cache: NormCache = field(default_factory=NormCache)
    power_iterations: dict[str, PowerIteration] = field(default_factory=dict)
    training: bool = False


@dataclass(frozen=True)
class Problem:
    """A graph, and what is asked of it: the argument of every method.

    Attributes:
        graph: The graph, with the input set on it.
        options: What is asked.
    """

    graph: Graph
    options: BoundOptions

    @property
    def module(self) -> Any:
        """The engine's BoundedModule."""
        return self.graph.module

    @property
    def C(self) -> Tensor | None:
        """Specification rows."""
        return self.options.C

    @property
    def lower(self) -> bool:
        """Whether the lower side is asked."""
        return self.options.lower

    @property
    def upper(self) -> bool:
        """Whether the upper side is asked."""
        return self.options.upper

    @property
    def final(self) -> Any:
        """The node that C is of: the graph's output, or where that is log p of a vector the logits before it, if the
        rows of C sum to 0: C log p = C z - (C 1) LSE(z)."""
        node = self.module.final_node()
        log_p = type(node) is BoundStableLogSoftmax and len(node.output_shape) == 2
        return node.inputs[0] if log_p and self.C is not None and not self.C.sum(2).any() else node

    def context(self, norms: str = "bound", outward: bool | None = None, **switches: Any) -> Context:
        """Context of a propagation.

        Args:
            norms: "bound" (sound) or "estimate" (training).
            outward: Outward rounding; None for float64 bounds, and for graphs with a function that has a pole or an
                end of its domain: there the last place of a box decides whether the bound is finite.
            **switches: Further switches of `Context`.
        """
        if norms not in ("bound", "estimate"):
            raise OptionError(f'norms must be "bound" (sound) or "estimate" (power iteration), got {norms!r}')
        estimate = norms == "estimate"
        if outward is None:
            outward = not estimate and (self._dtype() == torch.float64 or self._has_gaps())
        return Context(
            self.graph.cache,
            self.graph.power_iterations,
            estimate=estimate,
            training=self.graph.training,
            outward=outward,
            **switches,
        )

    def _dtype(self) -> torch.dtype:
        """Type that the bounds are computed in: that of the perturbed input, not torch's global default."""
        nodes = engine.ancestors_in_order(self.module.final_node())
        return next(node.value.dtype for node in nodes if node.perturbed and type(node) is engine.BoundInput)

    def _has_gaps(self) -> bool:
        nodes = engine.ancestors_in_order(self.final)
        functions = (scalar_function(node) for node in nodes if node.perturbed)
        return any(function is not None and function.has_gaps for function in functions)

    def propagate(self, context: Context, keep: bool = False) -> dict[str, State]:
        """Ball and box of the nodes: of all with `keep`, else of the final node and its inputs."""
        return propagate(self.module, context, keep, None if keep else self.final)

    def both_sides(self, minimum: Callable[[Tensor | None, int], Tensor]) -> Bounds:
        """The sides of `result`, without what a propagation wrote down. Deprecated."""
        warnings.warn("Problem.both_sides is Problem.result(context, minimum) now", DeprecationWarning, stacklevel=2)
        return self.result(Context(), minimum).sides

    def result(
        self, context: Context, minimum: Callable[[Tensor | None, int], Tensor], relaxation: Relaxation | None = None
    ) -> BoundResult:
        """The asked sides, each as a minimum: min C f, and max C f = -min -C f.

        Args:
            context: Of the propagation, which knows the norms it used and the nodes without a rule.
            minimum: (rows C, 1) or (rows -C, -1) -> the minimum of each row, (B, S). The rows are None where the
                outputs themselves are asked, times 1 or -1.
            relaxation: Slopes that the method chose.
        """
        lower = minimum(self.C, 1) if self.lower else None
        upper = -minimum(self.C if self.C is None else -self.C, -1) if self.upper else None
        return context_result(context, lower, upper, relaxation)


def context_result(
    context: Context, lower: Tensor | None, upper: Tensor | None, relaxation: Relaxation | None = None
) -> BoundResult:
    """These bounds, with what the propagation wrote down."""
    return BoundResult(
        lower, upper, relaxation, dict(context.fallbacks), dict(context.ended), dict(context.norms), context.estimate
    )


Method = Callable[..., BoundResult]
METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Family:
    """Methods that differ in a variant, ``"family:variant"``, or need options to run.

    Attributes:
        find: Variant ("" for the bare name) -> method; raises UnknownMethodError where there is none.
        names: What the list of known methods says.
    """

    find: Callable[[str], Method]
    names: tuple[str, ...]


FAMILIES: dict[str, Family] = {}


_WRAPPED: dict[Method, str | None] = {}  # methods that hand their further options to another


def register_method(name: str, function: Method, overwrite: bool = False, wraps: str | None = None) -> None:
    """Add a bound method, to be used as ``compute_bounds(method=name)``.

    Args:
        name: Name of the method; lower case.
        function: ``function(problem, *, option=default, ...)`` of a `Problem`, which returns a `BoundResult` or
            (lower, upper), None for a side that was not asked. Its keyword-only arguments are the method's options.
        overwrite: Replace a method that exists.
        wraps: Method that it hands its ``**options`` to, whose options are then its own, too.

    Raises:
        RegistrationError: The name is taken, by the engine or here, or is not lower case.
        UnknownMethodError: There is no method `wraps`.
    """
    if name != name.lower():
        raise RegistrationError(f"method names are lower case, got {name!r}")
    if name in engine.ENGINE_METHODS:
        raise RegistrationError(f"{name!r} is a method of the engine")
    if name.partition(":")[0] in FAMILIES:
        raise RegistrationError(f"{name!r} belongs to a family of methods")
    if wraps is not None:
        find_method(wraps)
    add(METHODS, "method", name, function, overwrite)
    _WRAPPED[function] = wraps


def known_methods() -> list[str]:
    """Names of all methods, this package's and the engine's."""
    load_extensions()
    families = [name for family in FAMILIES.values() for name in family.names]
    return sorted(METHODS) + families + sorted(engine.ENGINE_METHODS)


def find_method(name: str) -> Method:
    """Method of that name, case aside.

    Raises:
        UnknownMethodError: Neither the package nor the engine has one.
    """
    load_extensions()
    if isinstance(name, str):
        if name.lower() in METHODS:
            return METHODS[name.lower()]
        family, _, variant = name.lower().partition(":")
        if family in FAMILIES:
            return FAMILIES[family].find(variant)
    raise UnknownMethodError(f"unknown method {name!r}; known are {', '.join(known_methods())}")


def is_ours(name: Any) -> bool:
    """Whether a method of that name is this package's, not the engine's."""
    load_extensions()
    return isinstance(name, str) and (name.lower() in METHODS or name.lower().partition(":")[0] in FAMILIES)


def option_names(method: Method) -> list[str]:
    """Names of a method's options."""
    parameters = inspect.signature(method).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    wraps = _WRAPPED.get(method) if any(p.kind is p.VAR_KEYWORD for p in parameters) else None
    return own if wraps is None else own + [name for name in option_names(find_method(wraps)) if name not in own]


def label_option(name: str, labels: Tensor) -> dict[str, Tensor]:
    """{"labels": labels} for a method that has such an option, else {}."""
    return {"labels": labels} if is_ours(name) and "labels" in option_names(find_method(name)) else {}


def check_options(name: str, method: Method, options: dict[str, Any]) -> None:
    """Raise OptionError unless the method has every option."""
    known = option_names(method)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"method {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}")


def check_specification(C: Tensor, x: Tensor, outputs: int) -> None:
    """Raise InvalidInputError unless C has shape (B or 1, S, outputs), x's dtype and device, and no NaN."""
    batch = len(x)
    if C.dtype != x.dtype or C.device != x.device:
        raise InvalidInputError(f"C is {C.dtype} on {C.device}, the input {x.dtype} on {x.device}")
    if C.dim() != 3 or C.shape[0] not in (1, batch) or C.shape[2] != outputs:
        raise InvalidInputError(
            f"C has shape {tuple(C.shape)}; it must be ({batch}, rows, {outputs}): one row of coefficients of the "
            f"{outputs} outputs for each specification"
        )
    if not torch.isfinite(C).all():
        raise InvalidInputError("C has NaN or infinite entries")


def set_of(state: State) -> BallBox:
    """The set of a node that may be constant."""
    return state if isinstance(state, BallBox) else BallBox.point(state)
