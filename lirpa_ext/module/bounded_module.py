"""BoundedModule: the engine's class, made sound for l2, with this package's methods."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.norms import NormCache, PowerIteration, key_of
from ..engine.positive_list import Gap
from ..engine.precision import full_precision
from ..errors import OptionError, TraceError, UnsupportedNodeError
from ..extensions import load_extensions
from ..methods import (
    BoundOptions,
    BoundResult,
    Graph,
    LastLayer,
    Method,
    check_options,
    check_request,
    engine_methods,
    find_method,
    method_of,
    run_activation_bounds,
    run_last_layer,
    run_method,
)
from ..methods.clean_value import held
from ..methods.substitutes import Request, request
from ..nodes import CUSTOM_OPS, BoundBallBoxRelu, BoundPowerIteration, as_nodes
from ..rules.linear import power_iterable
from . import faithful
from .agreement import Agreement
from .state import ModelState
from .threads import LOCK, one_at_a_time
from .tracing import as_tuple, check_inputs, check_mode, check_nodes, plain, traceable_copy, with_our_perturbation


class BoundedModule(ModelState, engine.EngineBoundedModule):  # type: ignore[misc]
    """A torch model whose outputs can be bounded over a set of perturbed inputs.

    It extends the engine's BoundedModule by the methods of this package, bounds that hold for l2 whatever the first
    operation is, an eps for each sample, parametrized layers (spectral and weight norm), and batches of any size. The
    model itself is not changed (mode, `requires_grad`, buffers). The graph reads the model's own tensors, so that a
    weight update needs no rebuild.

    Args:
        model: The torch model, which returns one tensor. Batch norm must be in eval mode; dropout counts as identity.
        x: Example input, (B, ...), or a tuple of inputs. A `BoundedTensor` also becomes the default input.
        bound_opts: Options of the engine.
        device: Device of the graph, default that of the model's parameters.
        custom_ops: Further custom operators of the engine, by ONNX op name.
        **engine_options: Further arguments of the engine's BoundedModule.

    Attributes:
        last_result: Result of the last call (`lirpa_ext.methods.BoundResult`), without autograd graphs; None before the
            first call, and after a call that failed.

    Raises:
        TraceError: The engine cannot build the graph; its graph computes something else than the model; samples of a
            batch depend on each other; or the model draws random numbers.
        TrainModeError: A batch norm is in train mode, or the model computes something else in train mode than in eval
            mode, dropout aside.
        InvalidInputError: An input has NaN entries or another dtype than the model, or is in half precision.

    Example:
        >>> import torch
        >>> from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> x = BoundedTensor(torch.zeros(1, 2), PerturbationLpNorm(norm=2, eps=0.1))
        >>> lower, upper = BoundedModule(model, x).compute_bounds(method="bcp")
        >>> bool((lower <= model(torch.zeros(1, 2))).all())
        True
    """

    last_result: BoundResult | None = None

    @one_at_a_time
    def __init__(
        self,
        model: nn.Module,
        x: Tensor | tuple[Tensor, ...],
        bound_opts: dict[str, Any] | None = None,
        device: str | torch.device = "auto",
        custom_ops: dict[str, type] | None = None,
        **engine_options: Any,
    ) -> None:
        load_extensions()
        engine_options |= {"bound_opts": bound_opts, "device": device}
        set_attribute = object.__setattr__  # nn.Module's would register modules as graph nodes
        set_attribute(self, "source", model)
        set_attribute(self, "_build_options", engine_options)
        set_attribute(self, "_custom_ops", CUSTOM_OPS | (custom_ops or {}))
        set_attribute(self, "norm_cache", NormCache())
        set_attribute(self, "power_iterations", {})
        set_attribute(self, "_inside", False)  # whether the engine calls its own methods, through our overrides
        set_attribute(self, "_uncovered", {})
        set_attribute(self, "_agreement", Agreement())
        self._build(tuple(with_our_perturbation(tensor) for tensor in as_tuple(x)))

    def _build(self, inputs: tuple[Tensor, ...]) -> None:
        """Build the graph for inputs of these shapes, and compare it with the model."""
        model = self.source
        check_mode(model)
        check_inputs(model, inputs)
        object.__setattr__(self, "_inputs", inputs)
        example = tuple(plain(x) for x in inputs)
        object.__setattr__(self, "_uncovered", {})
        shadow = traceable_copy(model)
        options = copy.deepcopy(self._build_options["bound_opts"])
        rest = {key: value for key, value in self._build_options.items() if key != "bound_opts"}
        with self._computing(), engine.untouched(model), torch.no_grad():
            self._agreement.examine(model, shadow, example)
            complaints: list[str] = []
            try:
                with engine.captured_errors() as complaints, as_nodes(), warnings.catch_warnings():
                    # The tracer warns of values that it fixes; the graph is compared with the model below instead.
                    warnings.simplefilter("ignore", torch.jit.TracerWarning)
                    graph_input = example if len(example) > 1 else example[0]
                    super().__init__(shadow, graph_input, options, custom_ops=self._custom_ops, **rest)
            except Exception as error:  # the engine raises exceptions of any class
                ops = sorted({op for line in complaints for op in re.findall(r"op='([^']+)'", line)})
                unknown = f" (it does not know {', '.join(ops)})" if ops else ""
                cause = error.__cause__ or error.__context__  # 0.7's own error does not name the cause
                unknown += f" ({type(cause).__name__}: {cause})" if cause is not None else ""
                raise TraceError(
                    f"the engine (auto_LiRPA {engine.engine_version()}) cannot build a graph of "
                    f"{type(model).__name__}: {type(error).__name__}: {error}{unknown}. The forward must be traceable "
                    "by torch.jit.trace, return one tensor and use ops that the engine knows."
                ) from error
            check_nodes(self._modules.values())
            slopes = [engine.slope_below_zero(node) for node in self._modules.values()]
            if not all(0 <= slope <= 1 for slope in slopes):
                raise TraceError("a LeakyReLU has a slope outside of [0, 1], for which the engine's bounds do not hold")
            object.__setattr__(self, "_readers", engine.make_live(self, model))
            for node in list(self._modules.values()):
                object.__setattr__(node, "users", [self._modules[name] for name in node.output_name])
                object.__setattr__(node, "get_bias", functools.partial(engine.honest_bias, node))
            engine.learn_relu(self, BoundBallBoxRelu)
            self._check_same_function(shadow, [*faithful.around(example), *faithful.of_set(inputs)])
            self._add_power_iterations()
            engine.free_graphs(self)
            object.__setattr__(self, "_fresh", engine.snapshot(self))
            self._uncovered.clear()
        self._agreement.serve(inputs)

    @contextlib.contextmanager
    def _engine_inside(self) -> Iterator[None]:
        before = self._inside
        object.__setattr__(self, "_inside", True)
        try:
            yield
        finally:
            object.__setattr__(self, "_inside", before)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Context in which the graph is built and bounds are computed: lock, default dtype and full precision."""
        with LOCK, self._engine_inside(), engine.default_dtype(plain(self._inputs[0]).dtype), full_precision():
            yield

    def _check_same_function(self, shadow: nn.Module, points: list[faithful.Point], defined: bool = True) -> None:
        """Compare graph and model at points (`lirpa_ext.module.faithful.check_same_function`)."""

        def values() -> list[Any]:
            return [getattr(node, "forward_value", None) for node in self._modules.values()]

        faithful.check_same_function(super().forward, values, shadow, points, self._agreement.reads, defined)

    def _add_power_iterations(self) -> None:
        """Add a power-iteration node for the weight of every linear node; earlier builds' power iterations are kept."""
        geometries: dict[str, object] = {}
        for node in engine.ancestors_in_order(self.final_node()):
            found = power_iterable(node)
            if found is None:
                continue
            name, weight, linear_map = found
            made = linear_map(engine.constant(weight))
            name = key_of(name, made, geometries)
            known = self.power_iterations.get(name)
            if known is None or known.geometry != geometries[name]:
                self.power_iterations[name] = PowerIteration(made)
            hung = BoundPowerIteration(weight, self.power_iterations[name], linear_map)
            hung.name = f"power_iteration/{name}"
            self._modules[hung.name] = hung

    # --- bounds ----------------------------------------------------------------------------------------------

    @one_at_a_time
    def compute_bounds(
        self,
        x: Tensor | tuple[Tensor, ...] | None = None,
        aux: Any = None,
        C: Tensor | None = None,
        method: str | None = "backward",
        *args: Any,
        bound_lower: bool = True,
        bound_upper: bool = True,
        **options: Any,
    ) -> Any:
        """Bounds of C f(x') over all x' in the perturbation set.

        Args:
            x: Inputs, (B, ...), each perturbed one a `BoundedTensor`. Default: those of the last call.
            aux: The engine's argument of that name, for methods of the engine.
            C: Specification rows, (B, S, outputs) or (1, S, outputs). Default: the outputs themselves.
            method: "lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown", "sparse-slope", "slope:...", "cap", another
                registered method, or a method of the engine ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN", ...). Default
                "backward", the engine's name for CROWN.
            *args: Further positional arguments of the engine's `compute_bounds`.
            bound_lower: Compute lower bounds (default); else they are None.
            bound_upper: Compute upper bounds (default); else they are None.
            **options: Options of the method (`lirpa_ext.methods`), or the engine's further arguments.

        Returns:
            (lower, upper), each (B, S) or of the output's shape.

        Raises:
            UnknownMethodError: There is no method of that name.
            OptionError: An option is unknown or has a wrong value.
            InvalidInputError: eps, x or C has a wrong shape, range or value.
            UnsupportedNodeError: A node cannot be bound.
            SoundnessError: The bounds exclude the clean value, which is a defect of the method.
        """
        if self._inside:  # the engine calls itself
            return super().compute_bounds(
                x, aux, C, method, *args, bound_lower=bound_lower, bound_upper=bound_upper, **options
            )
        if _is_engines(method):
            asked = BoundOptions(str(method), C, bound_lower, bound_upper)
            return self._engine_bounds(x, aux, method, asked, engine_methods.named(args, options))
        if args or aux is not None:
            raise OptionError(f"method {method!r} takes its options by name")
        return self.bound(x, C, str(method), bound_lower=bound_lower, bound_upper=bound_upper, **options).sides

    @one_at_a_time
    def bound(
        self,
        x: Tensor | tuple[Tensor, ...] | None = None,
        C: Tensor | None = None,
        method: str = "bcp",
        *,
        bound_lower: bool = True,
        bound_upper: bool = True,
        **options: Any,
    ) -> BoundResult:
        """Bounds as by `compute_bounds`, together with records of how the method computed them.

        Args:
            x: As in `compute_bounds`.
            C: As in `compute_bounds`.
            method: As in `compute_bounds`, default "bcp".
            bound_lower: As in `compute_bounds`.
            bound_upper: As in `compute_bounds`.
            **options: Options of the method.

        Returns:
            The bounds, with slopes, norms and the clean output if the method has them, and the nodes without a rule.

        Raises:
            As `compute_bounds`.
        """
        asked = BoundOptions(str(method), C, bound_lower, bound_upper)
        if _is_engines(method):
            return BoundResult(*self._engine_bounds(x, None, method, asked, engine_methods.named((), options))[:2])
        object.__setattr__(self, "last_result", None)
        check_options(method, find_method(method), options)
        self._set_inputs(x)
        return self._run(method_of(method, options), asked)

    @one_at_a_time
    def activation_bounds(
        self, x: Tensor | tuple[Tensor, ...] | None = None, intermediate: str = "ibp"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Boxes of the inputs of every ReLU and LeakyReLU, differentiable in the model's parameters.

        Args:
            x: As in `compute_bounds`.
            intermediate: "ibp" (default), or "bcp" for boxes of the ball-box propagation.

        Returns:
            (lower, upper), each (B, ...), by the activation's name in the order of the graph.

        Raises:
            OptionError: `intermediate` is unknown.
            InvalidInputError: No input is perturbed.
        """
        self._set_inputs(x)
        with self._computing():
            return run_activation_bounds(self._graph, self._inputs, intermediate)

    @one_at_a_time
    def last_layer(self, x: Tensor | tuple[Tensor, ...] | None = None, tighten: bool = True) -> LastLayer | None:
        """The dense last layer, and the ball and box of its input by "bcp".

        Args:
            x: As in `compute_bounds`.
            tighten: As in `lirpa_ext.methods.bcp.bcp`. Default True.

        Returns:
            Set of the input, weight and bias; None if the output is not a dense layer of one perturbed vector.

        Raises:
            InvalidInputError: No input is perturbed.
        """
        self._set_inputs(x)
        with self._computing():
            return run_last_layer(self._graph, self._inputs, tighten)

    @one_at_a_time
    def forward(self, *x: Tensor, **kwargs: Any) -> Tensor:
        """The model's function, computed through the graph, with the arguments of the engine's `forward`.

        Args:
            *x: Inputs, (B, ...) each.
            **kwargs: Further arguments of the engine's `forward`.

        Returns:
            The outputs, (B, ...).
        """
        if self._inside:
            return super().forward(*x, **kwargs)
        self._set_inputs(x)
        try:
            return super().forward(*self._inputs, **kwargs)
        finally:
            engine.free_graphs(self)

    def _set_inputs(self, x: Tensor | tuple[Tensor, ...] | None) -> None:
        """Set and check the inputs of a call, and build the graph anew if it is not of these inputs and this model."""
        inputs = self._inputs if x is None else tuple(with_our_perturbation(tensor) for tensor in as_tuple(x))
        changed, agreement = self._agreement.changes(self.source), self._agreement
        if changed or not agreement.serves(inputs):
            try:
                self._build(inputs)
            except TraceError as error:
                if not changed:
                    raise
                raise TraceError(f"the model has changed since its graph was built ({changed}): {error}") from error
        else:
            check_mode(self.source)
            check_inputs(self.source, inputs)
        object.__setattr__(self, "_inputs", inputs)
        engine.refresh(self.source, self._readers)
        new_set = agreement.is_new(inputs, training=self.source.training and torch.is_grad_enabled())
        if new_set or not agreement.knows_mode(self.source):
            shadow = traceable_copy(self.source)
            with self._computing(), engine.untouched(self.source), torch.no_grad():
                agreement.check_mode(self.source, shadow, tuple(plain(x) for x in inputs))
                self._check_same_function(shadow, faithful.of_set(inputs), defined=False)
                engine.forget_values(self)

    @property
    def _graph(self) -> Graph:
        return Graph(self, self.norm_cache, self.power_iterations, self.source.training)

    def _run(self, method: Method, asked: BoundOptions) -> BoundResult:
        """Run a method of this package."""
        with self._computing():
            result = run_method(self._graph, method, self._inputs, asked)
        object.__setattr__(self, "last_result", result.detached())
        return result

    def _engine_bounds(self, x: Any, aux: Any, method: str | None, asked: BoundOptions, given: dict[str, Any]) -> Any:
        """Run a method of the engine: by the engine if its list covers the graph, else by this package's operators."""
        object.__setattr__(self, "last_result", None)
        wanted = request(method, given)
        asked = replace(asked, method=wanted.name)
        self._set_inputs(x)
        missing: list[Gap] | UnsupportedNodeError = self._uncovered_by(wanted)
        if not missing:
            try:
                return self._run_engine(aux, method, asked, given)
            except UnsupportedNodeError as error:
                missing = error
        elif aux is not None:
            given["aux"] = aux
        return self._run(engine_methods.substitute(wanted, missing, given), asked).sides

    def _uncovered_by(self, asked: Request) -> list[Gap]:
        """Nodes that the engine may not bound, found once for each family of bounds and choice of perturbed inputs."""
        key = asked.family, tuple(getattr(x, "ptb", None) is not None for x in self._inputs)
        if key not in self._uncovered:
            with self._computing():
                engine.set_input(self, *self._inputs)
                before = self.conv_mode
                self._uncovered[key] = engine_methods.uncovered(self, asked)
            if self.conv_mode != before:
                object.__setattr__(self, "_fresh", engine.snapshot(self))
        return self._uncovered[key]

    def _run_engine(self, aux: Any, method: str | None, asked: BoundOptions, options: dict[str, Any]) -> Any:
        """Run a method of the engine by the engine, on a graph that its list covers."""
        inputs, name, C, lower, upper = self._inputs, asked.method, asked.C, asked.lower, asked.upper
        if name.lower().startswith("dynamic"):
            inputs = tuple(
                engine.BoundedTensor(plain(x), x.ptb.engines_box(x)) if getattr(x, "ptb", None) is not None else x
                for x in inputs
            )
        if name == "alpha-CROWN":  # the engine's ascent runs backward several times through one graph
            engine.refresh(self.source, self._readers, detach=True)
        check_request(inputs, C, lower, upper, self.final_node().output_shape[1])
        C = None if C is None else C.expand(len(inputs[0]), -1, -1)
        if not any(options.get(name) for name in ("reuse_ibp", "reuse_alpha")):
            engine.restore(self._fresh)
        try:
            with self._computing(), engine.untouched(self.source):
                found = super().compute_bounds(inputs, aux, C, method, bound_lower=lower, bound_upper=upper, **options)
                found = self._checked(found, C, name)
        except Exception as error:
            raise engine_methods.as_ours(error, name) from error
        finally:
            engine.free_graphs(self, keep_bounds=True)
        if isinstance(found, tuple):
            object.__setattr__(self, "last_result", BoundResult(*found[:2]).detached())
        return found

    def IBP_general(self, node: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The engine's IBP of a node; one that is not perturbed is evaluated, as 0.3 would bound it by a wrong rule."""
        if node is not None and not node.perturbed:
            self.get_forward_value(node)
        return super().IBP_general(node, *args, **kwargs)

    def _checked(self, found: Any, C: Tensor | None, name: str) -> Any:
        """The engine's result, after a check that the bounds contain the clean value."""
        if not isinstance(found, tuple) or (found[0] is None and found[1] is None):
            return found  # the engine was asked for coefficients alone

        if self.source.training and any(bound is not None and bound.requires_grad for bound in found[:2]):
            return found
        with torch.no_grad():
            clean = super().forward(*(plain(x) for x in self._inputs))
            return *held(found[:2], clean, C, name, self, False), *found[2:]


def _is_engines(method: str | None) -> bool:
    return method is None or (isinstance(method, str) and method.lower() in engine.ENGINE_METHODS)
