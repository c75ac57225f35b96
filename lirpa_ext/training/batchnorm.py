"""Batch norm in certified training: the bounds take the clean batch's statistics, evaluation the population's.

In train mode a sample's output depends on the others of its batch, so no set of it can be propagated by itself. With
the mean and variance of the clean batch held fixed, each batch norm is an affine map of its sample, and the bound is
one of the function that gave the clean logits. The bound's gradient does not flow through the statistics: they are
constants to it. Processes take the statistics of their own share of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


def differs_in_training(model: nn.Module) -> bool:
    """Whether the model has a batch norm or a dropout in train mode, so that its clean logits are not its graph's."""
    kinds = (_BatchNorm, nn.modules.dropout._DropoutNd)
    return any(isinstance(module, kinds) and module.training for module in model.modules())


@contextlib.contextmanager
def recorded_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Collect mean and (biased) variance of what each train-mode batch norm is given, (channels,) each."""
    statistics: Statistics = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        statistics[module] = (x.mean(axes), x.var(axes, unbiased=False))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    hooks = [module.register_forward_pre_hook(record) for module in norms]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def fixed_statistics(statistics: Statistics) -> Iterator[None]:
    """Let these batch norms normalize with these statistics, as in eval mode; afterwards they are as before."""
    before = {
        module: (module._buffers["running_mean"], module._buffers["running_var"]) for module in statistics
    }  # fmt: skip
    try:
        for module, (mean, variance) in statistics.items():
            module.training = False
            module._buffers["running_mean"], module._buffers["running_var"] = mean, variance
        yield
    finally:
        for module, (mean, variance) in before.items():  # type: ignore[assignment]
            module.training = True
            module._buffers["running_mean"], module._buffers["running_var"] = mean, variance


@contextlib.contextmanager
def population_statistics(model: nn.Module) -> Iterator[None]:
    """Let the batch norms of a model be in eval mode for a while."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for module in norms:
            module.training = False
        yield
    finally:
        for module in norms:
            module.training = True
