"""Preparation of a model for the tracer: a copy of the model that shares its tensors, and checks of inputs and mode."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import engine
from ..domain.perturbation import PerturbationLpNorm
from ..errors import InvalidInputError, TraceError, TrainModeError
from ..nodes.operators import PerturbedInput
from ..randomized.sampling import draws_in_eval_mode

Inputs = tuple[Tensor, ...]


def traceable_copy(model: nn.Module) -> nn.Module:
    """A structural copy of the model for the tracer, in eval mode, which shares parameters and buffers.

    Parametrized weights (spectral norm, weight norm), which the engine cannot convert, become buffers that the
    graph reads from the model; dropout becomes the identity; every floating-point input first passes the node
    ``lirpa_ext::PerturbedInput``. The model itself is not changed.

    Args:
        model: The user's model.

    Raises:
        TraceError: The model cannot be copied, or is randomized.
    """
    check_deterministic(model)
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


def check_deterministic(model: nn.Module) -> None:
    """Raise TraceError for a randomized network, whose draws no bound covers."""
    if draws_in_eval_mode(model):
        raise TraceError(
            f"{type(model).__name__} is a randomized network: it draws another function at every call, and no bound "
            "of one holds for the next. Judge it under attack, by lirpa_ext.certification.evaluate"
        )


def in_mode_of(model: nn.Module) -> nn.Module | None:
    """A copy as by `traceable_copy`, but in the model's current mode; None if that is eval mode.

    Of torch's own layers, only instance norm is put in train mode. The others do not change with the mode, apply
    dropout, which counts as identity, or are refused in train mode (`check_mode`).

    Args:
        model: The user's model.
    """
    modes = {
        name: module.training and not _is_torchs(module) for name, module in model.named_modules()
    }  # fmt: skip
    if not any(modes.values()):
        return None
    own = traceable_copy(model)
    for name, module in own.named_modules():
        module.training = modes.get(name, False)
    return own


def _is_torchs(module: nn.Module) -> bool:
    instance_norm = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    return type(module).__module__.startswith("torch.nn.") and not instance_norm


def in_dtype(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs] | None:
    """A copy of the model and its inputs in another precision, to measure rounding errors.

    Args:
        model: The model.
        inputs: Inputs, (B, ...) each.
        dtype: The other floating-point type.

    Returns:
        Model and inputs; None if the model cannot be copied.
    """
    try:
        other = copy.deepcopy(model).to(dtype)
    except Exception:  # whatever a user's model raises
        return None
    return other, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _mark_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(PerturbedInput.apply(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def as_tuple(x: Any) -> Inputs:
    """Inputs as a tuple of tensors.

    Args:
        x: A tensor, or a tuple or list of tensors, (B, ...) each.

    Raises:
        InvalidInputError: `x` is something else, or a tensor has no batch axis or no samples.
    """
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise InvalidInputError(f"x must be a tensor or a tuple of tensors, got {type(x).__name__}")
    if any(tensor.dim() == 0 or len(tensor) == 0 for tensor in inputs):
        raise InvalidInputError("x must have a batch dimension and at least one sample")
    return inputs


def plain(x: Tensor) -> Tensor:
    """A `BoundedTensor`, or any tensor, as a plain tensor without perturbation."""
    return x.as_subclass(torch.Tensor)


def with_our_perturbation(x: Tensor) -> Tensor:
    """An input with its perturbation as an instance of this package's class, and with its center inside of the set.

    Tensors made in torch's inference mode are copied, since autograd does not take them.

    Args:
        x: The input, (B, ...), perturbed or not.

    Raises:
        InvalidInputError: The perturbation is of the engine's class, and its eps or range is invalid.
    """
    perturbation = getattr(x, "ptb", None)
    if _of_inference(x) or any(_of_inference(value) for value in vars(perturbation or x).values()):
        x = x.detach().clone().as_subclass(torch.Tensor)
        if perturbation is not None:
            perturbation = copy.copy(perturbation)
            vars(perturbation).update({k: v.clone() for k, v in vars(perturbation).items() if _of_inference(v)})
            x = engine.BoundedTensor(x, perturbation)
    if type(perturbation) is engine.EnginePerturbationLpNorm:
        perturbation = PerturbationLpNorm.of(perturbation, plain(x))
        x = engine.BoundedTensor(plain(x), perturbation)
    return _centered(x) if isinstance(perturbation, PerturbationLpNorm) else x


def _centered(x: Tensor) -> Tensor:
    """The same set with its center inside; only a box without eps may have a center outside of it."""
    if x.ptb.radius is not None:  # type: ignore[attr-defined]
        return x
    values = plain(x)
    try:
        lower, upper = x.ptb.box(values)  # type: ignore[attr-defined]
    except RuntimeError:  # a range of a wrong shape, which `check_inputs` reports
        return x
    inside = torch.minimum(torch.maximum(values, lower), upper)
    return x if torch.equal(inside, values) else engine.BoundedTensor(inside, x.ptb)  # type: ignore[attr-defined]


def _of_inference(value: Any) -> bool:
    """Whether a value is a tensor made in torch's inference mode, or one that shares its data."""
    if not isinstance(value, Tensor):
        return False
    try:
        return value._version < 0
    except RuntimeError:  # tensors made in inference mode have no version
        return True


def check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Check that bounds can be computed for some inputs.

    Args:
        model: The user's model.
        inputs: Inputs, (B, ...) each.

    Raises:
        InvalidInputError: An input has NaN or infinite entries, another dtype than the model, half precision, or
            complex numbers; whole numbers are perturbed; a center lies outside of its set; or autocast is on, under
            which the model computes another function than its graph.
    """
    parameter = next((p for p in engine.parameters(model) if p.is_floating_point()), None)
    if torch.is_autocast_enabled(inputs[0].device.type):
        raise InvalidInputError(
            "autocast is on, under which the model computes in half precision: bounds in full precision are not of its "
            "outputs. Put torch.autocast(..., enabled=False) around this"
        )
    for x in inputs:
        perturbation = getattr(x, "ptb", None)
        if not x.is_floating_point():
            if perturbation is not None or x.is_complex():
                raise InvalidInputError(f"the input is {x.dtype}: only real floating-point numbers can be perturbed")
            continue
        if x.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"the input is {x.dtype}: bounds are computed in torch.float32 or torch.float64; cast model and input"
            )
        if parameter is not None and x.dtype != parameter.dtype:
            raise InvalidInputError(f"the input is {x.dtype}, the model {parameter.dtype}: cast one of them")
        if isinstance(perturbation, PerturbationLpNorm):
            perturbation.check(plain(x))
        elif not torch.isfinite(x).all():
            raise InvalidInputError("the input has NaN or infinite entries")


_NORMALIZING = ("BoundSoftmax", "BoundLogSoftmax", "BoundStableSoftmax", "BoundStableLogSoftmax")


def check_nodes(nodes: Iterable[Any]) -> None:
    """Check the nodes of a graph for two cases that no rule covers.

    Args:
        nodes: The nodes.

    Raises:
        TraceError: The value of a node has no entries, such as ``x[:, 1:]`` of one feature; or a softmax normalizes
            over the batch, which comparisons of outputs do not show for constant values.
    """
    for node in nodes:
        shape = getattr(node, "output_shape", None)
        if shape is not None and 0 in shape[1:]:
            raise TraceError(
                f"node {node.name!r} ({type(node).__name__}) has no entries: its values are of shape {tuple(shape)}. "
                "Leave the operation out for inputs of this size"
            )
        if shape and node.from_input and type(node).__name__ in _NORMALIZING and node.axis % len(shape) == 0:
            raise TraceError(
                f"node {node.name!r} ({type(node).__name__}) normalizes over axis 0, the batch's, so that samples read "
                "each other. Take another axis"
            )


def check_mode(model: nn.Module) -> None:
    """Raise TrainModeError if a batch norm uses the statistics of the batch: in train mode, or without running ones."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise TrainModeError(
                f"batch norm {name!r} is in train mode, where a sample's output depends on the others of its batch; "
                "call model.eval(), or put the batch norms alone in eval mode"
            )
