"""The engine's methods: run by the engine on graphs that its positive list covers, else by this package, else refused.

The engine computes IBP, CROWN-IBP, CROWN, alpha-CROWN and the forward methods only for graphs whose nodes are all on
the list (`lirpa_ext.engine.positive_list`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import engine
from ..engine import Node
from ..engine.configuration import kind
from ..engine.limits import is_out_of_memory
from ..engine.positive_list import Gap, gaps
from ..errors import InvalidInputError, LirpaExtError, OptionError, OutOfMemoryError, UnsupportedNodeError
from .substitutes import SUBSTITUTES, Request

# Arguments of the engine that the substitutes support; other arguments change what the engine computes.
_UNDERSTOOD = ("IBP", "forward", "reuse_ibp")


def named(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of the engine's `compute_bounds`, all by name.

    Args:
        args: Positional arguments after the method.
        options: Arguments by name.

    Raises:
        OptionError: The engine's `compute_bounds` does not have one of the arguments, or takes fewer.
    """
    names = list(inspect.signature(engine.engine_compute_bounds).parameters)[5:]  # after self, x, aux, C, method
    if len(args) > len(names):
        raise OptionError(f"the engine's compute_bounds takes {len(names)} arguments after the method")
    given = dict(zip(names, args, strict=False)) | options
    unknown = [name for name in given if name not in names]
    if unknown:
        raise OptionError(f"the engine's methods have no option {unknown[0]!r}; theirs are {', '.join(names)}")
    return given


def uncovered(module: nn.Module, request: Request) -> list[Gap]:
    """Nodes and properties of a graph that are not on the list, for the input that is set on it.

    A graph in patches mode is changed to matrix mode if the list covers it in matrix mode only.

    Args:
        module: The graph, of this package's BoundedModule.
        request: The engine's method.
    """
    final: Any = module.final_node()  # type: ignore[operator]
    nodes = engine.ancestors_in_order(final)
    found = _of_the_graph(nodes, final)
    missing = gaps(nodes, request.family, _mode(module, request))
    if missing and _mode(module, request) == "patches":
        missing = gaps(nodes, request.family, "matrix")
        if not found and not missing:
            engine.use_matrix_mode(module)
    return found + missing


def check_covered(module: Any, inputs: tuple[Tensor, ...], request: Request) -> None:
    """Raise UnsupportedNodeError unless the list covers a graph of the engine's own class.

    In such a graph only dense and convolutional layers that read the input first know a ball of finite p; any other
    node gets an interval of width 0.

    Args:
        module: The graph, of the engine's BoundedModule.
        inputs: Inputs, (B, ...) each.
        request: The engine's method.
    """
    engine.set_input(module, *inputs)
    nodes = engine.ancestors_in_order(module.final_node())
    mode, constants = _mode(module, request), engine.IS_LEGACY
    missing = gaps(nodes, request.family, mode, constants)
    if missing and mode == "patches":
        missing = gaps(nodes, request.family, "matrix", constants)
        if not missing:
            engine.use_matrix_mode(module)
    missing = _of_the_graph(nodes, nodes[-1]) + missing
    balls = [node.name for node in _data(nodes) if _is_ball(node)]
    if balls:
        readers = [node for node in nodes if any(parent.name in balls for parent in node.inputs)]
        missing += [
            Gap(node.name, kind(node), "reads a ball of finite p first, of which it knows only the center")
            for node in readers
            if not _reads_the_ball(node)
        ]
    if missing:
        raise UnsupportedNodeError(
            f"method {request.name!r} is auto_LiRPA's own, and the {request.family} bounds of version "
            f"{engine.engine_version()} are not known to hold for {missing[0]}. lirpa_ext.BoundedModule bounds it by "
            'operators of its own; so do this package\'s methods, such as "bcp-crown"'
        )


def _data(nodes: list[Any]) -> list[Any]:
    """Input nodes of a graph that are not weights or buffers."""
    return [
        node
        for node in nodes
        if isinstance(node, engine.BoundInput) and not isinstance(node, (engine.BoundParams, engine.BoundBuffers))
    ]


def _reads_the_ball(node: Node) -> bool:
    """Whether a node that reads an input bounds its ball correctly: dense layers, and 2-D convolutions if p is 2."""
    ball = node.inputs[0]
    if kind(node) == "BoundConv":
        return _is_ball(ball) and ball.perturbation.norm == 2 and len(node.output_shape) == 4
    return kind(node) == "BoundLinear" and _is_ball(ball)


def _is_ball(node: Node) -> bool:
    perturbation = getattr(node, "perturbation", None)
    return perturbation is not None and perturbation.norm != math.inf


def _mode(module: nn.Module, request: Request) -> str:
    return "" if request.family == "interval" else str(getattr(module, "conv_mode", "matrix"))


def _of_the_graph(nodes: list[Any], final: Any) -> list[Gap]:
    """Gaps of the graph as a whole: perturbed weights, several inputs, and ranks of inputs and output."""
    found = []
    for node in nodes:
        if isinstance(node, (engine.BoundParams, engine.BoundBuffers)) and node.perturbed:
            found.append(Gap(node.name, kind(node), "perturbed weights"))
    data = _data(nodes)
    if len(data) != 1:
        found += [Gap(node.name, kind(node), f"one of {len(data)} inputs") for node in data]
    for node in [*data, final]:
        if len(node.output_shape) < 2:
            found.append(Gap(node.name, kind(node), "one number for each sample, of shape (B,)"))
    if len(final.output_shape) > 2:
        found.append(Gap(final.name, kind(final), f"an output of rank {len(final.output_shape)}"))
    return found


def substitute(
    request: Request, missing: list[Gap] | UnsupportedNodeError, options: dict[str, Any]
) -> Callable[..., Any]:
    """The method of this package in place of one of the engine's.

    Args:
        request: The engine's method.
        missing: The nodes that the list does not cover, or the error by which the engine failed.
        options: Given further arguments of the engine.

    Raises:
        UnsupportedNodeError: There is no such method, or it does not support a given argument.
    """
    others = [name for name, value in options.items() if name not in _UNDERSTOOD and value not in (None, False)]
    if request.name in SUBSTITUTES and not others:
        return SUBSTITUTES[request.name]
    if isinstance(missing, UnsupportedNodeError):
        raise missing
    can = ", ".join(f'"{name}"' for name in ("CROWN-IBP", "CROWN", "bcp-crown"))
    why = f"with its option {others[0]!r} " if request.name in SUBSTITUTES else ""
    rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise UnsupportedNodeError(
        f"method {request.name!r} {why}is auto_LiRPA's own, and the {request.family} bounds of version "
        f"{engine.engine_version()} are not known to hold for {missing[0]}{rest}. Methods that can bound this network: "
        f"{can}. docs/support.md lists what the engine is trusted with"
    )


def as_ours(error: Exception, method: str, node: Node | None = None) -> LirpaExtError:
    """An exception of the engine, of any class, as an error of this package.

    Args:
        error: The exception.
        method: Name of the method, for the message.
        node: Node at which the engine failed, if known.
    """
    if isinstance(error, LirpaExtError):
        return error
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    where = "" if node is None else f" at node {node.name!r} ({kind(node)})"
    if is_out_of_memory(error):
        return OutOfMemoryError(f"method {method!r} ran out of memory{where}: {text}")
    if isinstance(error, TypeError | ValueError) and node is None and "argument" in str(error):
        return InvalidInputError(f"method {method!r} does not take these arguments: {text}")
    return UnsupportedNodeError(
        f"auto_LiRPA {engine.engine_version()} failed in method {method!r}{where}: {text}. Methods of this package "
        '("bcp-crown", "slope:crown", "slope:ibp") do not need it'
    )
