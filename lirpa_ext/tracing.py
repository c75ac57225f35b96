"""What the engine is given to trace: a copy of the model that shares its tensors, and checked inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import engine
from .errors import InvalidInputError, TraceError, TrainModeError
from .operators import PerturbedInput
from .perturbation import PerturbationLpNorm
from .randomized.sampling import draws_in_eval_mode

Inputs = tuple[Tensor, ...]


def traceable_copy(model: nn.Module) -> nn.Module:
    """A structural copy of the model for the tracer, in eval mode, which shares parameters and buffers.

    Parametrized weights (spectral norm, weight norm), which the engine cannot convert, become buffers that the
    graph reads from the model; dropout becomes the identity; every floating-point input first passes the node
    `lirpa_ext::PerturbedInput`. The model itself is not touched.

    Raises:
        TraceError: The model cannot be copied, or is randomized.
    """
    if draws_in_eval_mode(model):
        raise TraceError(
            f"{type(model).__name__} is a randomized network: it draws another function at every call, and no bound "
            "of one holds for the next. Judge it under attack, by lirpa_ext.randomized.evaluate"
        )
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), engine.parametrizations_at_rest(model):
        values = {
            name: {weight: getattr(module, weight).detach().clone() for weight in module.parametrizations}
            for name, module in model.named_modules()
            if parametrize.is_parametrized(module)
        }
    try:
        shadow = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {error}. The hook-based torch.nn.utils.weight_norm and "
            "spectral_norm are not supported; use those of torch.nn.utils.parametrizations."
        ) from error
    for name, module in shadow.named_modules():
        if name in values:
            module.__class__ = module.__class__.__bases__[0]  # parametrize made a subclass for each module
            del module._modules["parametrizations"]
            for weight, value in values[name].items():
                module.register_buffer(weight, value)
    for module in shadow.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(module, name, nn.Identity())
    shadow.register_forward_pre_hook(_mark_inputs)
    return shadow.eval()


def _mark_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(PerturbedInput.apply(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def as_tuple(x: Any) -> Inputs:
    """Inputs as a tuple of tensors.

    Raises:
        InvalidInputError: Something else than tensors was given, or an empty batch.
    """
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise InvalidInputError(f"x must be a tensor or a tuple of tensors, got {type(x).__name__}")
    if any(tensor.dim() == 0 or len(tensor) == 0 for tensor in inputs):
        raise InvalidInputError("x must have a batch dimension and at least one sample")
    return inputs


def plain(x: Tensor) -> Tensor:
    """The tensor without its perturbation."""
    return x.as_subclass(torch.Tensor)


def with_our_perturbation(x: Tensor) -> Tensor:
    """The same input with its lp ball as this package's class (l2 sound, per-sample eps, data range)."""
    perturbation = getattr(x, "ptb", None)
    if type(perturbation) is not engine.EnginePerturbationLpNorm:
        return x
    return engine.BoundedTensor(plain(x), PerturbationLpNorm.of(perturbation))


def check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Raise InvalidInputError for NaN entries, another dtype than the model's, or a point outside of its set."""
    parameter = next((p for p in engine.parameters(model) if p.is_floating_point()), None)
    for x in inputs:
        if not x.is_floating_point():
            continue
        if parameter is not None and x.dtype != parameter.dtype:
            raise InvalidInputError(f"the input is {x.dtype}, the model {parameter.dtype}: cast one of them")
        perturbation = getattr(x, "ptb", None)
        if isinstance(perturbation, PerturbationLpNorm):
            perturbation.check(plain(x))
        elif not torch.isfinite(x).all():
            raise InvalidInputError("the input has NaN or infinite entries")


def check_mode(model: nn.Module) -> None:
    """Raise TrainModeError if a batch norm normalizes with the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise TrainModeError(
                f"batch norm {name!r} is in train mode, where a sample's output depends on the others of its batch; "
                "call model.eval(), or put the batch norms alone in eval mode"
            )
