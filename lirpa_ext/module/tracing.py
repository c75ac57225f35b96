"""What the engine is given to trace: a copy of the model that shares its tensors, and checked inputs."""

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
    `lirpa_ext::PerturbedInput`. The model itself is not touched.

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
    """Raise TraceError for a randomized network."""
    if draws_in_eval_mode(model):
        raise TraceError(
            f"{type(model).__name__} is a randomized network: it draws another function at every call, and no bound "
            "of one holds for the next. Judge it under attack, by lirpa_ext.certification.evaluate"
        )


def in_mode_of(model: nn.Module) -> nn.Module | None:
    """A copy as of `traceable_copy` in the mode that the model is in; None where that is no other than eval mode.

    Of torch's own layers only instance norm is put in train mode: the others have dropout there, which counts as
    identity, or are refused (`check_mode`).
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
    """A copy of the model in another precision, and the inputs, to see what rounding does; None if it has no copy."""
    try:
        other = copy.deepcopy(model).to(dtype)
    except Exception:  # whatever a user's model raises
        return None
    return other, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


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
    """The same input with its lp ball as this package's class (l2 sound, per-sample eps, data range); center inside.

    Of what was made in torch's inference mode it is a copy, through which gradients can go.
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
    """The same set with a center inside of it: that of a bare box may be anything."""
    if x.ptb.radius is not None:  # type: ignore[attr-defined]
        return x
    values = plain(x)
    try:
        lower, upper = x.ptb.box(values)  # type: ignore[attr-defined]
    except RuntimeError:  # a range of another shape, of which the check of the inputs tells
        return x
    inside = torch.minimum(torch.maximum(values, lower), upper)
    return x if torch.equal(inside, values) else engine.BoundedTensor(inside, x.ptb)  # type: ignore[attr-defined]


def _of_inference(value: Any) -> bool:
    """Whether a value is a tensor that was made in torch's inference mode, or shares its data with one."""
    if not isinstance(value, Tensor):
        return False
    try:
        return value._version < 0
    except RuntimeError:  # such tensors have no version
        return True


def check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Raise InvalidInputError for inputs that no bound can be computed of.

    NaN entries, another dtype than the model's, half precision or complex numbers, a perturbation of whole numbers, a
    point outside of its set; and autocast, under which the model computes another function than its graph.
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
    """Raise TraceError for a node that no rule has: one without any entry, or a softmax over the batch.

    The first is such as ``x[:, 1:]`` of one number. The second shows in no output where the values are constant.
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
    """Raise TrainModeError if a batch norm normalizes with the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise TrainModeError(
                f"batch norm {name!r} is in train mode, where a sample's output depends on the others of its batch; "
                "call model.eval(), or put the batch norms alone in eval mode"
            )
