"""The interface of a bound method, and the table of methods."""

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

Bounds = tuple[Tensor | None, Tensor | None]  # lower and upper bounds; None for a side that was not requested


@dataclass(frozen=True)
class BoundOptions:
    """The request of a call to any method: bounds of C f(x') over all x' in the perturbation set.

    Attributes:
        method: Name of the method, for messages.
        C: Specification rows, (B, S, outputs) or (1, S, outputs); None (default) for the outputs themselves.
        lower: Whether lower bounds are requested. Default True.
        upper: Whether upper bounds are requested. Default True.
    """

    method: str
    C: Tensor | None = None
    lower: bool = True
    upper: bool = True


@dataclass(frozen=True)
class BoundResult:
    """Bounds that a method computed, and how.

    Attributes:
        lower: Lower bounds, (B, S) or of the output's shape; None if not requested.
        upper: Upper bounds, (B, S) or of the output's shape; None if not requested.
        relaxation: Slopes of the activations, for methods that choose slopes; else None.
        fallbacks: Class of each node without a rule, which interval arithmetic bounded, by node name.
        ended_rows: Reason why coefficient rows ended early at a node, at the minimum over its set, by node name.
        norms: Norm that was used for each linear node, 0-dim, by the name of its weight.
        estimate: Whether the norms are estimates, for training; the bounds are then no certificate.
        clean: f(x), (B, ...), if it was computed on the way.
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
        """The same result without autograd graphs."""
        lower, upper, clean = (t if t is None else t.detach() for t in (*self.sides, self.clean))
        return replace(self, lower=lower, upper=upper, clean=clean)


@dataclass(frozen=True)
class Graph:
    """A graph of the engine, and the spectral norms of its layers.

    Attributes:
        module: The graph (a BoundedModule of the engine or of this package), with the input set on it.
        cache: Bounds on the norms of the layers.
        power_iterations: Power iterations that estimate the norms in training, by the weight's name.
        training: Whether the model is in training mode, in which power iterations take steps. Default False.
    """

    module: nn.Module
    cache: NormCache = field(default_factory=NormCache)
    power_iterations: dict[str, PowerIteration] = field(default_factory=dict)
    training: bool = False


@dataclass(frozen=True)
class Problem:
    """A graph and the requested bounds: the first argument of every method.

    Attributes:
        graph: The graph, with the input set on it.
        options: The requested bounds.
    """

    graph: Graph
    options: BoundOptions

    @property
    def module(self) -> Any:
        """The graph's BoundedModule."""
        return self.graph.module

    @property
    def C(self) -> Tensor | None:
        """Specification rows, (B or 1, S, outputs), or None."""
        return self.options.C

    @property
    def lower(self) -> bool:
        """Whether lower bounds are requested."""
        return self.options.lower

    @property
    def upper(self) -> bool:
        """Whether upper bounds are requested."""
        return self.options.upper

    @property
    def final(self) -> Any:
        """The node that C applies to: the graph's output, or the logits z before a final log-softmax.

        The latter if all rows of C sum to 0, since C log p = C z - (C 1) LSE(z) = C z.
        """
        node = self.module.final_node()
        log_p = type(node) is BoundStableLogSoftmax and len(node.output_shape) == 2
        return node.inputs[0] if log_p and self.C is not None and not self.C.sum(2).any() else node

    def context(self, norms: str = "bound", outward: bool | None = None, **switches: Any) -> Context:
        """Context of a propagation.

        Args:
            norms: "bound" (default), sound bounds on spectral norms, or "estimate", lower estimates for training.
            outward: Outward rounding. None (default) rounds outward, with "bound", in float64, and for graphs with a
                function that has a pole or a bounded domain: there rounding decides whether a bound is finite.
            **switches: Further switches of `Context`.

        Raises:
            OptionError: `norms` is unknown.
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
        """Type that the bounds are computed in: that of the perturbed input."""
        nodes = engine.ancestors_in_order(self.module.final_node())
        return next(node.value.dtype for node in nodes if node.perturbed and type(node) is engine.BoundInput)

    def _has_gaps(self) -> bool:
        nodes = engine.ancestors_in_order(self.final)
        functions = (scalar_function(node) for node in nodes if node.perturbed)
        return any(function is not None and function.has_gaps for function in functions)

    def propagate(self, context: Context, keep: bool = False) -> dict[str, State]:
        """Ball and box of the nodes, by `lirpa_ext.passes.ball_box.propagate`.

        Args:
            context: Norms and switches.
            keep: Return the sets of all nodes. Default False: only those of the final node and its inputs.

        Returns:
            Set of each perturbed node, value of each constant one, by node name.
        """
        return propagate(self.module, context, keep, None if keep else self.final)

    def both_sides(self, minimum: Callable[[Tensor | None, int], Tensor]) -> Bounds:
        """Deprecated: the bounds of `result`, without records of a propagation."""
        warnings.warn("Problem.both_sides is Problem.result(context, minimum) now", DeprecationWarning, stacklevel=2)
        return self.result(Context(), minimum).sides

    def result(
        self, context: Context, minimum: Callable[[Tensor | None, int], Tensor], relaxation: Relaxation | None = None
    ) -> BoundResult:
        """The requested bounds, from a function for minima: min C f, and max C f = -min -C f.

        Args:
            context: Context of the propagation, with its records.
            minimum: (rows C, 1) or (rows -C, -1) -> lower bound on the minimum of each row, (B, S). If the outputs
                themselves are requested, the rows are None, and the bounds those of the outputs times 1 or -1.
            relaxation: Slopes that the method chose. Default None.
        """
        lower = minimum(self.C, 1) if self.lower else None
        upper = -minimum(self.C if self.C is None else -self.C, -1) if self.upper else None
        return context_result(context, lower, upper, relaxation)


def context_result(
    context: Context, lower: Tensor | None, upper: Tensor | None, relaxation: Relaxation | None = None
) -> BoundResult:
    """A result with the given bounds, and the records of a propagation's context."""
    return BoundResult(
        lower, upper, relaxation, dict(context.fallbacks), dict(context.ended), dict(context.norms), context.estimate
    )


Method = Callable[..., BoundResult]
METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Family:
    """A family of methods with names ``"family:variant"``, or with required options.

    Attributes:
        find: Variant ("" for the bare name) -> method; raises UnknownMethodError for an unknown variant.
        names: Names of the family's methods, for the list of known methods.
    """

    find: Callable[[str], Method]
    names: tuple[str, ...]


FAMILIES: dict[str, Family] = {}


_WRAPPED: dict[Method, str | None] = {}  # method -> name of the method that it passes its further options to


def register_method(name: str, function: Method, overwrite: bool = False, wraps: str | None = None) -> None:
    """Add a bound method, to be used as ``compute_bounds(method=name)``.

    Args:
        name: Name of the method, in lower case.
        function: ``function(problem, *, option=default, ...)`` of a `Problem`, which returns a `BoundResult` or
            (lower, upper), with None for a side that was not requested. Its keyword-only arguments are the method's
            options.
        overwrite: Replace an existing method. Default False.
        wraps: Name of a method that the function passes its ``**options`` to; the options of that method then count
            as options of this one. Default None.

    Raises:
        RegistrationError: The name is taken, by the engine or this package, or is not lower case.
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
    """Names of all methods, of this package, its extensions, and the engine."""
    load_extensions()
    families = [name for family in FAMILIES.values() for name in family.names]
    return sorted(METHODS) + families + sorted(engine.ENGINE_METHODS)


def find_method(name: str) -> Method:
    """The method of this package or of an extension with a name.

    Args:
        name: Name of the method, in any case.

    Raises:
        UnknownMethodError: There is no such method, or it is one of the engine's.
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
    """Whether a name is that of a method of this package or an extension, not of the engine."""
    load_extensions()
    return isinstance(name, str) and (name.lower() in METHODS or name.lower().partition(":")[0] in FAMILIES)


def option_names(method: Method) -> list[str]:
    """Names of a method's options, including those of a method that it wraps."""
    parameters = inspect.signature(method).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    wraps = _WRAPPED.get(method) if any(p.kind is p.VAR_KEYWORD for p in parameters) else None
    return own if wraps is None else own + [name for name in option_names(find_method(wraps)) if name not in own]


def label_option(name: str, labels: Tensor) -> dict[str, Tensor]:
    """``{"labels": labels}`` if the method of that name has this option, else ``{}``.

    Args:
        name: Name of the method.
        labels: Labels, (B,).
    """
    return {"labels": labels} if is_ours(name) and "labels" in option_names(find_method(name)) else {}


def check_options(name: str, method: Method, options: dict[str, Any]) -> None:
    """Raise OptionError if an option is not one of the method's.

    Args:
        name: Name of the method, for the message.
        method: The method.
        options: Options by name.
    """
    known = option_names(method)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"method {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}")


def check_specification(C: Tensor, x: Tensor, outputs: int) -> None:
    """Check the specification rows against the input.

    Args:
        C: Specification rows.
        x: Input, (B, ...).
        outputs: Number of outputs of the graph.

    Raises:
        InvalidInputError: C has another shape than (B or 1, S, outputs), another dtype or device than `x`, or NaN or
            infinite entries.
    """
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
    """The set of a node; that of a constant value is a point."""
    return state if isinstance(state, BallBox) else BallBox.point(state)
