"""Forward propagation of balls and boxes through the engine's graph, node by node."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.batch_axis import batch_size, check_has_batch, check_is_batch
from ..domain.perturbation import PerturbationLpNorm
from ..domain.rounding import widened
from ..engine import Node
from ..errors import InvalidInputError
from ..rules import Context, State, propagate_node


def propagate(module: nn.Module, context: Context, keep: bool = False, final: Node | None = None) -> dict[str, State]:
    """Sets of the graph's nodes for the input that the graph holds.

    Args:
        module: A BoundedModule of the engine or of this package, after `engine.set_input`.
        context: Norms and switches; records of the propagation are written there.
        keep: Keep the sets of all nodes. Default False: keep only those of the final node and its inputs, which limits
            memory to the widest cut through the graph.
        final: The node to end at, default the graph's output.

    Returns:
        Set of each kept perturbed node, value of each kept constant one, by node name.

    Raises:
        UnsupportedNodeError: Neither a rule nor the engine can bound a node.
        InvalidInputError: A weight is perturbed, where only inputs may be.
    """
    final = module.final_node() if final is None else final  # type: ignore[operator]
    order = engine.ancestors_in_order(final)
    keep_values = keep or engine.reads_old_values(order)
    uses = Counter(parent.name for node in order for parent in node.inputs)
    kept = {node.name for node in order} if keep else {final.name, *(parent.name for parent in final.inputs)}
    states: dict[str, State] = {}
    for node in order:
        center = module.get_forward_value(node)  # type: ignore[operator]
        if not node.perturbed or engine.is_shape(node):
            states[node.name] = center
        elif isinstance(node, engine.BoundInput):
            states[node.name] = input_set(node, context)
        else:
            check_has_batch(node)
            inputs = [states[parent.name] for parent in node.inputs]
            states[node.name] = propagate_node(node, inputs, center, context)
        for parent in node.inputs:
            uses[parent.name] -= 1
            if not uses[parent.name] and parent.name not in kept:
                del states[parent.name]
                if parent.perturbed and not keep_values:
                    parent.forward_value = None
    output = states[final.name]
    if isinstance(output, BallBox):
        check_is_batch(final, output.center, batch_size(final))
    return states


def input_set(node: Node, context: Context) -> BallBox:
    """Ball and box of the perturbation set of an input node.

    Args:
        node: The input node, with its perturbation.
        context: Switches of the propagation.

    Raises:
        InvalidInputError: The node is a weight, or its perturbation no lp ball.
    """
    if isinstance(node, (engine.BoundParams, engine.BoundBuffers)):
        raise InvalidInputError(f"{node.ori_name!r} is perturbed; the ball-box methods take perturbed inputs only")
    perturbation = PerturbationLpNorm.of(node.perturbation)
    state = BallBox.from_input(node.value.as_subclass(torch.Tensor), perturbation, context.ball_only)
    plain_ball = state.lower is None and perturbation.norm == 2
    return widened(state) if context.outward and not plain_ball else state
