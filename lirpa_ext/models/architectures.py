"""From a description to the torch module: a network of the zoo or of the user's, normalized, randomized."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, InvalidInputError
from ..randomized import make_adv_bnn, make_rse
from .preprocessing import Normalization
from .zoo import ARCHITECTURES, zoo_network

__all__ = ["ARCHITECTURES", "Network", "build", "named_network"]

RANDOMIZED: dict[str, Callable[..., nn.Module]] = {"adv-bnn": make_adv_bnn, "rse": make_rse}
"""Name -> function that turns a network into a randomized one."""


@dataclass
class Network:
    """Architecture and input of a network, from which `build` makes the torch module.

    Args:
        name: One of `ARCHITECTURES`, or ``package.module:callable`` that returns a torch module.
        input_shape: Shape of one image, (C, H, W).
        classes: Number of classes, default 10.
        mean: Per-channel mean, subtracted inside of the network; default none.
        std: Per-channel standard deviation, by which the network divides its input; default none.
        randomized: "adv-bnn" or "rse" (`RANDOMIZED`) for a randomized network, default "" for a deterministic one.
        options: Options of `lirpa_ext.randomized.make_adv_bnn` or `make_rse`, such as ``{prior_std: 0.05}``.
    """

    name: str
    input_shape: list[int]
    classes: int = 10
    mean: list[float] | None = None
    std: list[float] | None = None
    randomized: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def build(network: Network) -> nn.Module:
    """Build a network with torch's default initial weights, in train mode.

    Args:
        network: Name, input shape, number of classes and normalization.

    Returns:
        Classifier, (B, C, H, W) -> (B, classes).

    Raises:
        ConfigError: The name is unknown, the image is too small for the network, the output does not have one logit for
            each class, or the user's callable fails.
    """
    shape = list(network.input_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"network.input_shape is (channels, height, width) of one image, got {shape}")
    if network.classes < 2:
        raise ConfigError(f"network.classes must be 2 or more, got {network.classes}")
    if network.name in ARCHITECTURES:
        body = zoo_network(network.name, shape, network.classes)
    elif ":" in network.name:
        body = _users(network.name)
    else:
        raise ConfigError(
            f"unknown network {network.name!r}: known are {', '.join(ARCHITECTURES)}, and package.module:callable"
        )
    if network.mean is not None or network.std is not None:
        mean, std = (
            values if values is not None else [default] * shape[0]
            for values, default in ((network.mean, 0.0), (network.std, 1.0))
        )
        if len(mean) not in (1, shape[0]):
            raise ConfigError(f"network.mean has {len(mean)} numbers, an image {shape[0]} channels")
        body = nn.Sequential(Normalization(mean, std), body)
    try:
        with torch.no_grad():
            logits = body.eval()(torch.zeros(1, *shape))
    except Exception as error:  # of a user's network, or an image smaller than a kernel
        raise ConfigError(
            f"network {network.name!r} fails on an image of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    if logits.shape != (1, network.classes):
        raise ConfigError(
            f"network {network.name!r} gives outputs of shape {tuple(logits.shape)} for one image, not "
            f"(1, {network.classes}): set network.classes"
        )
    return _randomized(body, network).train()


def _randomized(body: nn.Module, network: Network) -> nn.Module:
    if not network.randomized:
        if network.options:
            raise ConfigError(f"network.options are of network.randomized, which is not set: {network.options}")
        return body
    if network.randomized not in RANDOMIZED:
        raise ConfigError(f"unknown network.randomized {network.randomized!r}: known are {', '.join(RANDOMIZED)}")
    try:
        return RANDOMIZED[network.randomized](body, **network.options)
    except (TypeError, InvalidInputError) as error:
        raise ConfigError(f"network.randomized {network.randomized!r}: {error}") from error


def named_network(**network: Any) -> nn.Module:
    """Build a network of `ARCHITECTURES` only; an untrusted checkpoint may call this function and no other.

    Args:
        **network: The fields of `Network`.

    Returns:
        Classifier, (B, C, H, W) -> (B, classes), in train mode.

    Raises:
        ConfigError: The name is not in `ARCHITECTURES`, or as `build`.
    """
    if network.get("name") not in ARCHITECTURES:
        raise ConfigError(f"network {network.get('name')!r} is none of {', '.join(ARCHITECTURES)}")
    return build(Network(**network))


def _users(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # a user's code
        raise ConfigError(f"network {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"network {name!r} gave a {type(made).__name__}, not a torch module")
    return made
