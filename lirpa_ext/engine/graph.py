"""The engine's graph: the order of its nodes, their values, and the attributes that bound methods leave on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .compatibility import IS_LEGACY, BoundedTensor, BoundInput, bound_ops


class Node(Protocol):
    """A node of the graph as rules and passes see it: the attributes of all nodes, and others that depend on its class.

    Attributes:
        name: Name of the node in the graph.
        inputs: Nodes whose values the node reads.
        perturbed: Whether the node depends on a perturbed input.
        output_shape: Shape of the node's value, including the batch.
    """

    name: str
    inputs: list[Node]
    perturbed: bool
    output_shape: torch.Size

    def forward(self, *x: Any) -> Any:
        """Value of the node for the given values of its inputs."""

    def __getattr__(self, name: str) -> Any:
        """An attribute that only some classes of nodes have, such as an axis or a stride."""


def set_input(module: nn.Module, *x: Tensor) -> None:
    """Put the inputs on the graph's input nodes, mark the nodes that they perturb, and drop values of the last call.

    The values become plain tensors, since some functions of a `BoundedTensor` return a plain tuple.

    Args:
        module: The graph.
        *x: Inputs, (B, ...) each; a `BoundedTensor` is perturbed.
    """
    (module._set_input if IS_LEGACY else module.set_input)(*x)  # type: ignore[operator]
    node: Any
    for node in module._modules.values():
        if type(node) is BoundInput and isinstance(node.value, BoundedTensor):
            node.value = node.value.as_subclass(Tensor)


def ancestors_in_order(node: Any) -> list[Any]:
    """`node` and all nodes that it depends on, inputs before users (the order of 0.7 itself is not topological)."""
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
_LIVE = ("live", "users", "get_bias", "ball", "slope")  # attributes of nodes that this package sets and keeps


def snapshot(module: nn.Module) -> Snapshot:
    """Copy the attributes of all nodes of a graph, to be put back by `restore` before the engine runs a method.

    Slopes, stages and shapes that one method leaves on the nodes make other methods fail, or use what was made for
    another input.
    """
    kept: Snapshot = [(node, {}) for node in module._modules.values()]
    for node, values in kept:
        values.update({name: _shallow(value) for name, value in node.__dict__.items() if name not in _LIVE})
    options = {name: _shallow(module.__dict__[name]) for name in _OF_THE_GRAPH if name in module.__dict__}
    return [*kept, (module, options)]


def restore(kept: Snapshot) -> None:
    """Put the attributes that `snapshot` copied back on the nodes, and delete those added since."""
    *nodes, (module, options) = kept
    for node, values in nodes:
        for name in [name for name in node.__dict__ if name not in values and name not in _LIVE]:
            del node.__dict__[name]
        node.__dict__.update({name: _shallow(value) for name, value in values.items()})
    module.__dict__.update({name: _shallow(value) for name, value in options.items()})


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


# Options of the engine for sparse bounds of convolutions; in matrix mode 0.3 gives these a wrong shape.
_SPARSE = (
    "sparse_intermediate_bounds", "sparse_conv_intermediate_bounds", "sparse_features_alpha", "sparse_spec_alpha",
)  # fmt: skip


def use_matrix_mode(module: Any) -> None:
    """Let the engine's backward passes keep coefficients of images as matrices from now on, not as "patches"."""
    module.conv_mode = "matrix"
    module.bound_opts |= {"conv_mode": "matrix"} | dict.fromkeys(_SPARSE, False)
    for node in module._modules.values():
        if getattr(node, "mode", None) == "patches":
            node.mode = "matrix"
        for name in ("use_sparse_features_alpha", "use_sparse_spec_alpha"):
            if hasattr(node, name):
                setattr(node, name, False)


def weight_scale(node: Any) -> float:
    """Factor alpha of a Gemm node, alpha A B + beta C."""
    return node.alpha if IS_LEGACY else node.alpha_linear


def bias_scale(node: Any) -> float:
    """Factor beta of the bias of a Gemm or matmul node, alpha A B + beta C."""
    return node.beta if IS_LEGACY else node.beta_linear


def slope_below_zero(node: Any) -> float:
    """Slope of a ReLU or LeakyReLU node below 0; 0 for other nodes."""
    alpha = getattr(node, "alpha", 0.0)
    return getattr(node, "leaky_alpha", 0.0) or (alpha if isinstance(alpha, float) else 0.0)


def reads_old_values(order: list[Any]) -> bool:
    """Whether any node's forward reads values of nodes that are not its inputs, as 0.3's layer normalization does."""
    return IS_LEGACY and any(
        isinstance(node, bound_ops.BoundDiv) and isinstance(node.inputs[1], bound_ops.BoundSqrt) for node in order
    )


def is_shape(node: Any) -> bool:
    """Whether a node's value is the shape of another node's value; 0.3 marks it as perturbed if that node is."""
    return isinstance(node, bound_ops.BoundShape)


def aligned_constants(node: Any) -> list[Any]:
    """Constant inputs of a node that broadcast with its output: one with as many axes has the batch as its first axis.

    Args:
        node: A sum, difference, product, quotient, concatenation, or product of stacks of matrices; other nodes have
            none.
    """
    joins = tuple(getattr(bound_ops, f"Bound{name}") for name in ("Add", "Sub", "Mul", "Div", "Concat"))
    stacked = isinstance(node, bound_ops.BoundMatMul) and len(node.output_shape) > 2  # a product of stacks of matrices
    aligned = stacked or isinstance(node, joins)
    return [parent for parent in node.inputs if not parent.perturbed] if aligned else []


def constant(node: Any) -> Tensor:
    """Value of a node that does not depend on a perturbed input: a weight, a shape or a constant."""
    value = getattr(node, "forward_value", None)
    if value is None:
        value = node.forward(*[constant(parent) for parent in node.inputs])
    return value if isinstance(value, Tensor) else torch.tensor(value)


def forget_values(module: nn.Module) -> None:
    """Drop the clean values of all nodes, so that they are computed anew when next read."""
    node: Any
    for node in module._modules.values():
        if hasattr(node, "forward_value"):
            del node.forward_value


def free_graphs(module: nn.Module, keep_bounds: bool = False) -> None:
    """Drop the tensors that the engine leaves on its nodes, and with them the autograd graphs they hold.

    Args:
        module: The graph.
        keep_bounds: Keep the nodes' bounds, detached, for users who read them after a call. Default False.
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
            elif IS_LEGACY:  # 0.3 tests for bounds by hasattr
                delattr(node, name)
            else:
                setattr(node, name, None)
        _detach_attributes(node)
    _detach_attributes(module)


def _detach_attributes(holder: Any) -> None:
    """Detach all other tensors that were left: slopes, intercepts, the last IBP bounds, ..."""
    for name, value in list(holder.__dict__.items()):
        # torch raises on reading the grad_fn of a view made under no_grad whose base was changed in place since.
        if isinstance(value, Tensor) and (value._is_view() or value.grad_fn is not None):
            object.__setattr__(holder, name, value.detach())


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a module; the method `parameters` of 0.3 fails on today's torch."""
    for part in module.modules():
        yield from (parameter for parameter in part._parameters.values() if parameter is not None)


def buffers(module: nn.Module) -> Iterator[Tensor]:
    """All buffers of a module; the method `buffers` of 0.3 fails on today's torch."""
    for part in module.modules():
        yield from (buffer for buffer in part._buffers.values() if buffer is not None)


def bound_backward(node: Any, rows: Tensor, start: Any) -> Any:
    """The engine's backward bound of a node for the lower side.

    Args:
        node: The node; `set_bounds` has put the bounds of its inputs on the input nodes.
        rows: Coefficient rows of the node's output, (S, B, ...).
        start: The node that the backward pass started from.

    Returns:
        ([(rows of an input, None), ...], bias, 0): coefficient rows (S, B, ...) for each input, and the bias (S, B).
    """
    if not IS_LEGACY:
        return node.bound_backward(
            rows, None, *node.inputs, start_node=start, unstable_idx=None, start_shape=rows.shape[:1]
        )
    if isinstance(node, bound_ops.BoundOptimizableActivation):
        return node.bound_backward(rows, None, *node.inputs, start_shape=rows.shape[0], start_node=start)
    return node.bound_backward(rows, None, *node.inputs)


def honest_bias(node: Any, A: Any, bias: Any) -> Any:
    """The engine's `get_bias`, with NaN confined to the sample that it belongs to.

    The engine drops the bias of all samples if the product of one is NaN, to remove 0 * inf. Here 0 * inf is 0, and
    any other NaN stays in the bias of its sample.

    Args:
        node: The node.
        A: Coefficient rows, (S, B, ...), or in the engine's patches form.
        bias: Bias of the node's relaxation, which broadcasts with `A`.

    Returns:
        Bias of the rows, (S, B).
    """
    total = type(node).get_bias(node, A, bias)
    if isinstance(total, Tensor) or not isinstance(A, Tensor):
        return total
    terms = torch.where((A == 0) & ~bias.isnan(), 0.0, A * bias)
    return terms.reshape(*A.shape[:2], -1).sum(2)


def set_bounds(node: Any, lower: Tensor, upper: Tensor) -> None:
    """Put bounds (B, ...) on a node for the engine's relaxations; unlike its own argument, this keeps gradients."""
    node.lower, node.upper = lower, upper
    node.interval = (lower, upper)


def learn_relu(module: nn.Module, relu: type) -> None:
    """Add a class of ReLU nodes to 0.3's list of classes whose intermediate bounds come from IBP; no-op on 0.7."""
    known: Any = module.ibp_intermediate if IS_LEGACY else [relu]
    if relu not in known:
        known.append(relu)
