"""The engine's graph: its nodes in order, their values, and what a method leaves on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .compatibility import IS_LEGACY, BoundedTensor, BoundInput, bound_ops


class Node(Protocol):
    """A node of the graph, as rules and passes see it: what all nodes have, and further attributes of its kind.

    Attributes:
        name: Its name in the graph.
        inputs: The nodes that it reads.
        perturbed: Whether it depends on a perturbed input.
        output_shape: Shape of its value, with the batch.
    """

    name: str
    inputs: list[Node]
    perturbed: bool
    output_shape: torch.Size

    def forward(self, *x: Any) -> Any:
        """Its value, for values of its inputs."""

    def __getattr__(self, name: str) -> Any:
        """An attribute of its kind, such as an axis or a stride."""


def kind(node: Any) -> str:
    """The exact name of a node's class, by which tables know it."""
    return type(node).__name__


def set_input(module: nn.Module, *x: Tensor) -> None:
    """Put the inputs on the graph's roots and mark which nodes they perturb; drops what the last call left.

    The values become plain tensors: some functions of a `BoundedTensor` give a plain tuple.
    """
    (module._set_input if IS_LEGACY else module.set_input)(*x)  # type: ignore[operator]
    node: Any
    for node in module._modules.values():
        if type(node) is BoundInput and isinstance(node.value, BoundedTensor):
            node.value = node.value.as_subclass(Tensor)


def ancestors_in_order(node: Any) -> list[Any]:
    """All nodes that `node` depends on and itself, inputs before users (0.7's own order is not topological)."""
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(node, False)]
    while stack:
        current, expanded = stack.pop()
        if expanded:
            order.append(current)
        elif id(current) not in seen:
            seen.add(id(current))
            stack.append((current, True))
            stack.extend((parent, False) for parent in current.inputs)
    return order


Snapshot = list[tuple[Any, dict[str, Any]]]

_OF_THE_GRAPH = ("bound_opts", "final_shape", "last_final_node", "last_final_node_name")
_LIVE = ("live", "users", "get_bias", "ball", "slope")  # of a node: set by this package, and kept


def snapshot(module: nn.Module) -> Snapshot:
    """What the engine keeps on the nodes of a graph, to be put back before it runs the next method.

    Slopes, stages and shapes that one method leaves there make others fail, or use what was made for another input.
    """
    kept: Snapshot = [(node, {}) for node in module._modules.values()]
    for node, values in kept:
        values.update({name: _shallow(value) for name, value in node.__dict__.items() if name not in _LIVE})
    options = {name: _shallow(module.__dict__[name]) for name in _OF_THE_GRAPH if name in module.__dict__}
    return [*kept, (module, options)]


def restore(kept: Snapshot) -> None:
    """Put back what `snapshot` kept, and drop what came since, on the nodes."""
    *nodes, (module, options) = kept
    for node, values in nodes:
        for name in [name for name in node.__dict__ if name not in values and name not in _LIVE]:
            del node.__dict__[name]
        node.__dict__.update({name: _shallow(value) for name, value in values.items()})
    module.__dict__.update({name: _shallow(value) for name, value in options.items()})


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


# In matrix mode 0.3's sparse bounds of convolutions are wrong in shape.
_SPARSE = (
    "sparse_intermediate_bounds", "sparse_conv_intermediate_bounds", "sparse_features_alpha", "sparse_spec_alpha",
)  # fmt: skip


def use_matrix_mode(module: Any) -> None:
    """Keep coefficients of images as matrices in backward passes from now on, not as the engine's "patches"."""
    module.conv_mode = "matrix"
    module.bound_opts |= {"conv_mode": "matrix"} | dict.fromkeys(_SPARSE, False)
    for node in module._modules.values():
        if getattr(node, "mode", None) == "patches":
            node.mode = "matrix"
        for name in ("use_sparse_features_alpha", "use_sparse_spec_alpha"):
            if hasattr(node, name):
                setattr(node, name, False)


def weight_scale(node: Any) -> float:
    """Factor alpha of a Gemm node's product."""
    return node.alpha if IS_LEGACY else node.alpha_linear


def bias_scale(node: Any) -> float:
    """Factor beta of a Gemm or matmul node's bias."""
    return node.beta if IS_LEGACY else node.beta_linear


def slope_below_zero(node: Any) -> float:
    """Slope of a ReLU or LeakyReLU node below 0; 0 for other nodes."""
    alpha = getattr(node, "alpha", 0.0)
    return getattr(node, "leaky_alpha", 0.0) or (alpha if isinstance(alpha, float) else 0.0)


def reads_old_values(order: list[Any]) -> bool:
    """Whether a node's forward reads values other than its inputs': 0.3's layer normalization does."""
    return IS_LEGACY and any(
        isinstance(node, bound_ops.BoundDiv) and isinstance(node.inputs[1], bound_ops.BoundSqrt) for node in order
    )


def is_shape(node: Any) -> bool:
    """Whether a node is the shape of another, which 0.3 takes for perturbed where that one is."""
    return isinstance(node, bound_ops.BoundShape)


def aligned_constants(node: Any) -> list[Any]:
    """Constant inputs of a node whose first axis is the batch's wherever they have as many axes as the output."""
    joins = tuple(getattr(bound_ops, f"Bound{name}") for name in ("Add", "Sub", "Mul", "Div", "Concat"))
    stacked = isinstance(node, bound_ops.BoundMatMul) and len(node.output_shape) > 2  # of matrices
    aligned = stacked or isinstance(node, joins)
    return [parent for parent in node.inputs if not parent.perturbed] if aligned else []


def constant(node: Any) -> Tensor:
    """Value of a node that does not depend on a perturbed input (a weight, a shape, a constant)."""
    value = getattr(node, "forward_value", None)
    if value is None:
        value = node.forward(*[constant(parent) for parent in node.inputs])
    return value if isinstance(value, Tensor) else torch.tensor(value)


def forget_values(module: nn.Module) -> None:
    """Drop the clean values of all nodes, so that the next look at one computes it anew."""
    node: Any
    for node in module._modules.values():
        if hasattr(node, "forward_value"):
            del node.forward_value


def free_graphs(module: nn.Module, keep_bounds: bool = False) -> None:
    """Drop the tensors that the engine leaves on its nodes, and with them the autograd graphs they hold.

    Args:
        module: The graph.
        keep_bounds: Keep the nodes' bounds, detached, for those who read them after a call.
    """
    node: Any
    for node in module._modules.values():
        for name in ("interval", "forward_value", "lA", "uA", "linear", "ball"):
            if name in node.__dict__ or name in node._parameters:
                delattr(node, name)
        for name in ("lower", "upper"):
            bound = getattr(node, name, None)
            if not isinstance(bound, Tensor):
                continue
            if keep_bounds:
                setattr(node, name, bound.detach())
            elif IS_LEGACY:  # which asks for hasattr
                delattr(node, name)
            else:
                setattr(node, name, None)
        _detach_attributes(node)
    _detach_attributes(module)


def _detach_attributes(holder: Any) -> None:
    """Cut the graphs of whatever else was left: slopes, intercepts, the last IBP bounds, ..."""
    for name, value in list(holder.__dict__.items()):
        # Of a view that torch.no_grad made, and whose base has changed since, torch refuses to give the grad_fn.
        if isinstance(value, Tensor) and (value._is_view() or value.grad_fn is not None):
            object.__setattr__(holder, name, value.detach())


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters; 0.3's own `parameters()` fails on today's torch."""
    for part in module.modules():
        yield from (parameter for parameter in part._parameters.values() if parameter is not None)


def buffers(module: nn.Module) -> Iterator[Tensor]:
    """All buffers; 0.3's own `buffers()` fails on today's torch."""
    for part in module.modules():
        yield from (buffer for buffer in part._buffers.values() if buffer is not None)


def bound_backward(node: Any, rows: Tensor, start: Any) -> Any:
    """The node's backward bound for the lower side: ([(rows of input, None), ...], bias, 0).

    Args:
        node: The node; the bounds of its inputs are on them (`set_bounds`).
        rows: Coefficients of its output, (S, B, ...).
        start: The node that the pass started from.
    """
    if not IS_LEGACY:
        return node.bound_backward(
            rows, None, *node.inputs, start_node=start, unstable_idx=None, start_shape=rows.shape[:1]
        )
    if isinstance(node, bound_ops.BoundOptimizableActivation):
        return node.bound_backward(rows, None, *node.inputs, start_shape=rows.shape[0], start_node=start)
    return node.bound_backward(rows, None, *node.inputs)


def honest_bias(node: Any, A: Any, bias: Any) -> Any:
    """The engine's `get_bias`, which drops the terms of all samples where one of them is NaN.

    That is meant for 0 * inf, which is 0 here; a NaN stays with its sample.
    """
    total = type(node).get_bias(node, A, bias)
    if isinstance(total, Tensor) or not isinstance(A, Tensor):
        return total
    terms = torch.where((A == 0) & ~bias.isnan(), 0.0, A * bias)
    return terms.reshape(*A.shape[:2], -1).sum(2)


def set_bounds(node: Any, lower: Tensor, upper: Tensor) -> None:
    """Hand bounds to the engine's relaxations, differentiably (its own argument for them detaches)."""
    node.lower, node.upper = lower, upper
    node.interval = (lower, upper)


def learn_relu(module: nn.Module, relu: type) -> None:
    """0.3 keeps an exact-type list of nodes whose intermediate bounds come from IBP."""
    known: Any = module.ibp_intermediate if IS_LEGACY else [relu]
    if relu not in known:
        known.append(relu)
