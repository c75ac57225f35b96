"""Randomized networks: which layers draw random numbers, networks with fixed draws, and ensemble predictions.

A randomized network is a distribution over networks; each forward pass draws another network (Lee, 2021, 2.2.1). Here
a draw is a seed: `sample` returns a module that computes the same function at every call. Random layers of this package
subclass `RandomLayer`; random layers of other packages are named in `ADAPTERS`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError

__all__ = ["ADAPTERS", "Adapter", "RandomLayer", "Sampled", "is_randomized", "predict", "require_randomized", "sample"]

_MOST_ROWS = 1024  # rows of one forward pass of several draws, in `predict`


class RandomLayer(nn.Module, ABC):
    """A layer that draws random numbers at every call. Subclasses write `draw`, and `held`, which uses the draws."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """One draw, of any type that `held` takes; it depends on the generator's state alone."""

    @abstractmethod
    def held(self, x: Tensor, draws: Sequence[Any]) -> Tensor:
        """Output of the layer for given draws.

        Args:
            x: Inputs, (len(draws) * B, ...): the k-th block of B rows goes through the k-th draw.
            draws: Results of `draw`.

        Returns:
            Outputs, (len(draws) * B, ...), in the same order.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Output for a new draw, whose seed comes from torch's global generator."""
        return self.held(x, [self.draw(seeded(int(torch.randint(2**62, ())), x.device))])


class Adapter(NamedTuple):
    """Functions that give a random layer of another package the interface of `RandomLayer`.

    Attributes:
        active: (layer) -> whether the layer draws in its current mode.
        draw: (layer, generator) -> one draw of the layer.
        held: (layer, its forward function, inputs, draws) -> output, with inputs and draws as in `RandomLayer.held`.
    """

    active: Callable[[nn.Module], bool]
    draw: Callable[[nn.Module, torch.Generator], Any]
    held: Callable[[nn.Module, Callable[[Tensor], Any], Tensor, Sequence[Any]], Any]


def _seed(layer: nn.Module, generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _replay(layer: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, draws: Sequence[int]) -> Any:
    """The layer's own forward pass with torch's global generator at the seed of the draw, which is then restored."""
    outputs = []
    for block, seed in zip(x.chunk(len(draws)), draws, strict=True):
        for name, buffer in layer._buffers.items():
            if buffer is not None and "eps" in name:  # noise overwritten at every call, which backward still needs
                layer._buffers[name] = buffer.clone()
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            outputs.append(forward(block))
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return torch.cat([output for output, _ in outputs]), outputs[0][1]  # the KL term, the same for all draws


_OWN = Adapter(
    lambda layer: True,
    lambda layer, generator: layer.draw(generator),  # type: ignore[operator]
    lambda layer, forward, x, draws: layer.held(x, draws),  # type: ignore[operator]
)
_UNFROZEN = Adapter(lambda layer: layer.weight_eps is None, _seed, _replay)
_ALWAYS = Adapter(lambda layer: True, _seed, _replay)
_TRAINING = Adapter(lambda layer: layer.training, _seed, _replay)

# Name of a layer's class, or of a base class of it -> adapter. Names, so that no package need be imported.
ADAPTERS: dict[str, Adapter] = {
    f"{RandomLayer.__module__}.RandomLayer": _OWN,
    **{f"torchbnn.modules.{name}": _UNFROZEN for name in ("linear.BayesLinear", "conv.BayesConv2d")},
    "torchbnn.modules.batchnorm._BayesBatchNorm": _UNFROZEN,
    "bayesian_torch.layers.base_variational_layer.BaseVariationalLayer_": _ALWAYS,
    "torch.nn.modules.dropout._DropoutNd": _TRAINING,
    "torch.nn.modules.activation.RReLU": _TRAINING,
}


def _adapter(layer: nn.Module) -> Adapter | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(layer).__mro__)
    return next((ADAPTERS[name] for name in names if name in ADAPTERS), None)


def _random_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Adapter]]:
    """Layers that draw, each once and in the order of the model; none inside of another one or of a `Sampled`."""
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, Adapter]]:
        if id(module) in seen or isinstance(module, Sampled):
            return
        seen.add(id(module))
        adapter = _adapter(module)
        if adapter is not None and adapter.active(module):
            yield module, adapter
            return
        for child in module.children():
            yield from walk(child)

    yield from walk(model)


class Sampled(nn.Module):
    """Networks drawn from a randomized one, with fixed draws: the same inputs give the same outputs at every call.

    Parameters and buffers are the model's own, and outputs are differentiable in them and in the inputs.

    Args:
        model: Randomized network. All draws of a deterministic network are that network itself.
        seeds: Seeds of the draws, one for each drawn network.

    Attributes:
        model: The randomized network.
        seeds: Seeds of the draws.
    """

    def __init__(self, model: nn.Module, seeds: Sequence[int]) -> None:
        super().__init__()
        self.model, self.seeds = model, tuple(seeds)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        sources = [seeded(seed, device) for seed in self.seeds]
        self._held = [
            (layer, adapter, [adapter.draw(layer, source) for source in sources])
            for layer, adapter in _random_layers(model)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the drawn networks, each for inputs of its own.

        Args:
            x: Inputs, (len(seeds) * B, ...): the k-th block of B rows goes through the k-th network.

        Returns:
            (len(seeds) * B, ...), in the same order.

        Raises:
            InvalidInputError: The number of rows is no multiple of the number of networks.
        """
        if x.shape[0] % len(self.seeds):
            raise InvalidInputError(f"{x.shape[0]} inputs cannot be shared by {len(self.seeds)} networks evenly")
        with self._installed():
            return self.model(x)

    def each(self, x: Tensor) -> Tensor:
        """Outputs of every drawn network at the same inputs, in one pass.

        Args:
            x: Inputs, (B, ...).

        Returns:
            (len(seeds), B, classes).
        """
        logits = self(x.expand(len(self.seeds), *x.shape).flatten(0, 1))
        return logits.view(len(self.seeds), len(x), *logits.shape[1:])

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Replace the forward functions of the random layers, for a while, by ones with the fixed draws."""
        before = [(layer, layer.__dict__.get("forward")) for layer, _, _ in self._held]
        try:
            for layer, adapter, draws in self._held:
                layer.__dict__["forward"] = _bound(layer, adapter, draws)
            yield
        finally:
            for layer, forward in before:
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = forward


def _bound(layer: nn.Module, adapter: Adapter, draws: Sequence[Any]) -> Callable[[Tensor], Any]:
    forward = layer.forward
    return lambda x: adapter.held(layer, forward, x, draws)


def is_randomized(model: nn.Module) -> bool:
    """Whether any layer of the model draws in its current mode; a `Sampled`, whose draws are fixed, does not."""
    return next(_random_layers(model), None) is not None


def draws_in_eval_mode(model: nn.Module) -> bool:
    """Whether any layer draws in eval mode too, or is a `Sampled`: such a model cannot be traced as one network."""
    kinds = ((module, _adapter(module)) for module in model.modules())
    return any(
        isinstance(module, Sampled) or (kind is not None and kind is not _TRAINING and kind.active(module))
        for module, kind in kinds
    )


def require_randomized(model: nn.Module, what: str) -> None:
    """Raise InvalidInputError unless the model is randomized.

    Args:
        model: The model.
        what: What needs a randomized network, for the message.
    """
    if not is_randomized(model):
        raise InvalidInputError(
            f"{what} needs a randomized network, and no layer of this {type(model).__name__} draws anything: make one "
            "by lirpa_ext.randomized.make_rse or make_adv_bnn, or name its layers in "
            "lirpa_ext.randomized.sampling.ADAPTERS"
        )


def sample(model: nn.Module, generator: torch.Generator, draws: int = 1) -> Sampled:
    """Draw networks from a randomized one, and fix the draws.

    The n-th network is the same whether networks are drawn one by one or together.

    Args:
        model: Randomized network. All draws of a deterministic network are that network itself.
        generator: Source of the draws; its state advances, so that the next call draws others.
        draws: Number of networks, default 1.

    Returns:
        The drawn networks; a single one maps (B, ...) to (B, classes) as the model does.

    Raises:
        InvalidInputError: `draws` is below 1.
    """
    if draws < 1:
        raise InvalidInputError(f"at least one network must be drawn, got draws = {draws}")
    return Sampled(model, torch.randint(2**62, (draws,), generator=generator, device=generator.device).tolist())


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Tensor,
    draws: int,
    generator: torch.Generator | None = None,
    by: str = "probability",
) -> Tensor:
    """Prediction of an ensemble of drawn networks: mean probabilities, or shares of the votes.

    Args:
        model: Randomized classifier, (B, ...) -> (B, classes).
        x: Inputs, (B, ...).
        draws: Number of networks in the ensemble; Lee (2021) uses 20.
        generator: Source of the draws, default a new generator of seed 0.
        by: "probability" (default) or "vote"; a network votes for its largest logit, the first one of a tie.

    Returns:
        (B, classes), whose rows sum to 1. A row is NaN if any network gives NaN for the sample.

    Raises:
        InvalidInputError: `draws` is below 1, or `by` is unknown.
    """
    if by not in ("probability", "vote"):
        raise InvalidInputError(f"by is 'probability' or 'vote', got {by!r}")
    seeds = sample(nn.Identity(), seeded(0) if generator is None else generator, draws).seeds
    together = max(1, _MOST_ROWS // max(1, len(x)))
    total: Tensor | float = 0.0
    for start in range(0, draws, together):
        logits = Sampled(model, seeds[start : start + together]).each(x)
        shares = logits.softmax(-1)
        if by == "vote":
            votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
            shares = votes + 0 * shares.sum(-1, keepdim=True)  # the second term keeps NaN
        total = total + shares.sum(0)
    assert isinstance(total, Tensor)
    return total / draws


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator of this seed on a device; the numbers that it gives depend on the type of device."""
    return torch.Generator(device).manual_seed(seed)
