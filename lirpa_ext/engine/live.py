"""The user's model under a graph: nodes read the model's own tensors, and leave the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compatibility import BoundBuffers, BoundParams
from .graph import parameters


class LiveParams(BoundParams):
    """A parameter node that reads the user's own tensor and never changes its `requires_grad`.

    Attributes:
        live: The tensor, as read by the last `refresh`.
    """

    live: Tensor

    def forward(self) -> Tensor:
        return self.live


class LiveBuffers(BoundBuffers):
    """A buffer node that reads the user's own tensor, where the engine's reads a clone made at the build.

    Used for the running statistics of batch norms, and for weights computed by a parametrization (spectral norm,
    weight norm), whose gradients then reach the original parameters.

    Attributes:
        live: The tensor, as read by the last `refresh`.
    """

    live: Tensor

    def forward(self) -> Tensor:
        return self.live


def make_live(module: nn.Module, model: nn.Module) -> list[tuple[Any, Callable[[], Tensor]]]:
    """Turn every parameter and buffer node into a reader of `model`'s tensor of the same name.

    Args:
        module: The graph.
        model: The user's model.

    Returns:
        (node, reader) pairs for `refresh`, to be called at the start of each computation.
    """
    readers: list[tuple[Any, Callable[[], Tensor]]] = []
    for node in module._modules.values():
        if isinstance(node, BoundParams):
            node.__class__ = LiveParams
        elif isinstance(node, BoundBuffers):
            node.__class__ = LiveBuffers
        else:
            continue
        get = attrgetter(node.ori_name)

        def read(get: Callable[[nn.Module], Tensor] = get) -> Tensor:
            return get(model)

        readers.append((node, read))
    refresh(model, readers)
    return readers


@contextlib.contextmanager
def parametrizations_at_rest(model: nn.Module) -> Iterator[None]:
    """Put parametrizations in eval mode for a while: reading a spectral_norm weight in train mode runs a power step."""
    modes = [
        (part, part.training)
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module.modules()
    ]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def refresh(model: nn.Module, readers: list[tuple[Any, Callable[[], Tensor]]], detach: bool = False) -> None:
    """Read the user's tensors once, so that one computation sees one value of each.

    Args:
        model: The user's model.
        readers: What `make_live` returned.
        detach: Detach weights that a parametrization computes. Default False.
    """
    with parametrizations_at_rest(model):
        values = [read() for _, read in readers]
    for (node, _), value in zip(readers, values, strict=True):
        live = value.detach() if detach and not value.is_leaf else value
        live = live.clone() if live.is_inference() else live  # autograd takes no tensor made in inference mode
        object.__setattr__(node, "live", live)  # nn.Module's own __setattr__ would register a parameter


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` and `grad` of every parameter and train/eval mode of every submodule on exit."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None  # alpha-CROWN's ascent goes backward into the weights as well
        yield
    finally:
        for parameter, requires_grad, grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a while: the engine creates some of its tensors without a dtype.

    Args:
        dtype: The dtype; one that is not of floating-point numbers changes nothing.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype.is_floating_point else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
