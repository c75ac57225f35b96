"""Adv-BNN: networks with a Gaussian posterior over their weights, trained by an adversarial evidence lower bound.

X. Liu, Y. Li, C. Wu, C.-J. Hsieh: Adv-BNN: improved adversarial defense through robust Bayesian neural network,
ICLR 2019.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from ..errors import InvalidInputError
from .sampling import RandomLayer

__all__ = ["BayesianLayer", "elbo_loss", "kl_divergence", "make_adv_bnn"]

Weights = dict[str, Tensor]


class BayesianLayer(RandomLayer):
    """A layer whose weights are drawn from independent Gaussians: weight = mean + std * noise.

    Args:
        layer: Dense or convolutional layer; its weights become the means.
        prior_std: Standard deviation of the prior N(0, prior_std^2), the same for all weights.
        init_std: Standard deviation of the posterior before training.

    Attributes:
        mean: The layer with the mean weights.
        log_std: Logarithms of the standard deviations, one parameter for each parameter of the layer.
    """

    def __init__(self, layer: nn.Module, prior_std: float, init_std: float) -> None:
        super().__init__()
        self.mean, self.prior_std = layer, prior_std
        self.log_std = nn.ParameterDict(
            {name: torch.full_like(mean, math.log(init_std)) for name, mean in layer.named_parameters()}
        )

    def draw(self, generator: torch.Generator) -> Weights:
        """Standard normal noise for each parameter of the layer, by its name."""
        return {
            name: torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device)
            for name, mean in self.mean.named_parameters()
        }

    def held(self, x: Tensor, draws: Sequence[Weights]) -> Tensor:
        """Outputs of the drawn layers, as in `RandomLayer.held`; several draws take one pass of `torch.func.vmap`."""
        if len(draws) == 1:
            return functional_call(self.mean, self._weights(draws[0]), (x,))
        noise = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        blocks = x.unflatten(0, (len(draws), -1))
        return vmap(lambda weights, block: functional_call(self.mean, weights, (block,)))(
            self._weights(noise), blocks
        ).flatten(0, 1)

    def _weights(self, noise: Weights) -> Weights:
        means = dict(self.mean.named_parameters())
        return {name: means[name] + self.log_std[name].exp() * noise[name].to(means[name]) for name in means}

    def kl_divergence(self) -> Tensor:
        """Kullback-Leibler divergence of the posterior from the prior, over all weights, 0-dim and in nats.

        sum of log(prior_std / std) + (std^2 + mean^2) / (2 prior_std^2) - 1/2.
        """
        total = torch.zeros(())
        for name, mean in self.mean.named_parameters():
            log_std = self.log_std[name]
            terms = math.log(self.prior_std) - log_std - 0.5
            terms = terms + ((2 * log_std).exp() + mean.square()) / (2 * self.prior_std**2)
            total = total.to(terms) + terms.sum()
        return total

    def extra_repr(self) -> str:
        """Standard deviation of the prior, for the layer's printed form."""
        return f"prior_std={self.prior_std}"


def make_adv_bnn(model: nn.Module, prior_std: float = 0.1, init_std: float | None = None) -> nn.Module:
    """A copy of a network with a posterior over the weights and biases of every dense and convolutional layer.

    Args:
        model: Any torch module, which is not changed. Its weights become the means.
        prior_std: Standard deviation of the Gaussian prior of mean 0. Lee (2021) uses 0.05 (MNIST), 0.1 (CIFAR-10, the
            default) and 0.15 (STL-10).
        init_std: Standard deviation of the posterior before training, default `prior_std`, as in the official code.

    Returns:
        The randomized network. Other layers, such as batch norm, are copied as they are.

    Raises:
        InvalidInputError: A standard deviation is not positive or not finite; the network has no dense or
            convolutional layer; such a layer is parametrized (spectral or weight norm), so that its weights are not
            parameters; or two layers share a weight.
    """
    init_std = prior_std if init_std is None else init_std
    for name, value in (("prior_std", prior_std), ("init_std", init_std)):
        if not 0 < value < math.inf:
            raise InvalidInputError(f"{name} is a standard deviation, above 0, got {value}")
    _check_untied(model)
    made = nn.Sequential(copy.deepcopy(model))  # so that a single layer has a place too
    layers: dict[nn.Module, BayesianLayer] = {}
    for parent in list(made.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear | nn.modules.conv._ConvNd) and not isinstance(parent, RandomLayer):
                if parametrize.is_parametrized(child):
                    raise InvalidInputError(f"layer {name!r} is parametrized: its weights cannot have a posterior")
                layers.setdefault(child, BayesianLayer(child, prior_std, init_std))
                parent._modules[name] = layers[child]
    if not layers:
        raise InvalidInputError(f"this {type(model).__name__} has no dense or convolutional layer to make Bayesian")
    return made[0]


def _check_untied(model: nn.Module) -> None:
    """Raise InvalidInputError if two layers share a weight, which would get two posteriors and two draws."""
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            here = f"{path}.{name}" if path else name
            first = owners.setdefault(id(weight), here)
            if first != here:
                raise InvalidInputError(
                    f"{first!r} and {here!r} are one weight, which has one posterior. Use one layer in both places, or "
                    "give each a weight of its own"
                )


def kl_divergence(model: nn.Module) -> Tensor:
    """Sum of `BayesianLayer.kl_divergence` over the layers of a network.

    Args:
        model: Network with Bayesian layers.

    Returns:
        0-dim, in nats.

    Raises:
        InvalidInputError: The network has no `BayesianLayer`.
    """
    parts = [layer.kl_divergence() for layer in model.modules() if isinstance(layer, BayesianLayer)]
    if not parts:
        raise InvalidInputError(
            f"this {type(model).__name__} has no Bayesian layer: make one by lirpa_ext.randomized.make_adv_bnn"
        )
    return torch.stack(parts).sum()


def elbo_loss(model: nn.Module, logits: Tensor, y: Tensor, samples: int, kl_factor: float = 0.02) -> Tensor:
    """Negative evidence lower bound per sample, averaged over the batch: cross entropy + kl_factor * KL / samples.

    With logits at adversarial examples, this is the loss of Adv-BNN (Liu et al., 2019).

    Args:
        model: Network with Bayesian layers.
        logits: Logits of one draw of the network, (B, classes).
        y: Labels, (B,).
        samples: Size of the whole training set.
        kl_factor: Weight of the KL divergence, default 0.02, as in Lee (2021); 1 gives the evidence lower bound itself.

    Returns:
        0-dim, in nats.

    Raises:
        InvalidInputError: `samples` is below 1, `kl_factor` is negative, or there is no Bayesian layer.
    """
    if samples < 1 or not 0 <= kl_factor < math.inf:
        raise InvalidInputError(f"samples must be 1 or more and kl_factor 0 or more, got {samples} and {kl_factor}")
    return nn.functional.cross_entropy(logits, y) + kl_factor / samples * kl_divergence(model)
