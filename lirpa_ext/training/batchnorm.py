"""Batch norm in certified training: bounds use the statistics of the clean batch, evaluation the running statistics.

In train mode the output of a sample depends on the other samples of its batch, so that no set around a single sample
can be propagated. With the mean and variance of the clean batch held fixed, each batch norm is an affine map of the
sample, and the bound is one of the function that gave the clean logits. The statistics are constants of the bound: its
gradient does not flow through them. Each process takes the statistics of its own share of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


def differs_in_training(model: nn.Module) -> bool:
    """Whether a batch norm or a dropout is in train mode, so that the model's logits differ from those of its graph."""
    kinds = (_BatchNorm, nn.modules.dropout._DropoutNd)
    return any(isinstance(module, kinds) and module.training for module in model.modules())


@contextlib.contextmanager
def recorded_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Collect mean and (biased) variance of the input of each train-mode batch norm during the ``with``.

    Args:
        model: The model; call it once within the ``with``.

    Yields:
        Batch norm -> (mean, variance), (channels,) each, filled when the model is called.
    """
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
    """Let batch norms use given statistics, as in eval mode, during the ``with``; afterwards they are as before.

    Args:
        statistics: Batch norm -> (mean, variance), of `recorded_statistics`.
    """
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
    """Put the batch norms of a model in eval mode during the ``with``."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for module in norms:
            module.training = False
        yield
    finally:
        for module in norms:
            module.training = True
