"""Randomized networks: which layers draw, one drawn network to hold on to, and the prediction of many.

A randomized network F is a distribution over networks; each forward pass draws another one (S. Lee, 2021, 2.2.1). Here
a draw is a seed: `sample` turns it into a module that computes the same function at every call. Layers of our own
subclass `RandomLayer`; those of others are named in `ADAPTERS`.
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

_MOST_ROWS = 1024  # of a batch of all draws together, in `predict`


class RandomLayer(nn.Module, ABC):
    """A layer that draws something at every call: a subclass says what, and what it computes of it."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """One draw, whatever `held` takes; a function of the generator's state alone."""

    @abstractmethod
    def held(self, x: Tensor, draws: Sequence[Any]) -> Tensor:
        """Output for draws that are given.

        Args:
            x: Inputs, (len(draws) * B, ...): the k-th block of B rows goes through the k-th draw.
            draws: Results of `draw`.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Output of a new draw, from torch's global generator."""
        return self.held(x, [self.draw(seeded(int(torch.randint(2**62, ())), x.device))])


class Adapter(NamedTuple):
    """How a layer that is no `RandomLayer` draws.

    Attributes:
        active: Whether the layer draws in the mode that it is in.
        draw: One draw of the layer.
        held: Its output for given draws, of its own forward function, inputs and draws as in `RandomLayer.held`.
    """

    active: Callable[[nn.Module], bool]
    draw: Callable[[nn.Module, torch.Generator], Any]
    held: Callable[[nn.Module, Callable[[Tensor], Any], Tensor, Sequence[Any]], Any]


def _seed(layer: nn.Module, generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _replay(layer: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, draws: Sequence[int]) -> Any:
    """The layer's own forward pass with torch's global generator set to the seed of the draw, and set back after."""
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
    return torch.cat([output for output, _ in outputs]), outputs[0][1]  # the KL term, which no draw changes


_OWN = Adapter(
    lambda layer: True,
    lambda layer, generator: layer.draw(generator),  # type: ignore[operator]
    lambda layer, forward, x, draws: layer.held(x, draws),  # type: ignore[operator]
)
_UNFROZEN = Adapter(lambda layer: layer.weight_eps is None, _seed, _replay)
_ALWAYS = Adapter(lambda layer: True, _seed, _replay)
_TRAINING = Adapter(lambda layer: layer.training, _seed, _replay)

# Name of a class, or of a class that it derives from -> how it draws. No package is imported for it.
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
    """Layers that draw, each once and in the order of the model; not those inside of each other, nor held ones."""
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
    """Drawn networks, held: a view of a randomized network that gives the same outputs for the same inputs.

    Parameters and buffers are the model's own, and outputs are differentiable in them and in the inputs.

    Args:
        model: Randomized network. A deterministic one is its only draw.
        seeds: One for each network.

    Attributes:
        model: The randomized network.
        seeds: Of its draws.
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
        """Logits of inputs (len(seeds) * B, ...), the k-th block of B rows through the k-th network.

        Raises:
            InvalidInputError: The rows cannot be shared out evenly.
        """
        if x.shape[0] % len(self.seeds):
            raise InvalidInputError(f"{x.shape[0]} inputs cannot be shared by {len(self.seeds)} networks evenly")
        with self._installed():
            return self.model(x)

    def each(self, x: Tensor) -> Tensor:
        """Logits of every network at the same inputs, (B, ...) -> (len(seeds), B, classes), in one pass."""
        logits = self(x.expand(len(self.seeds), *x.shape).flatten(0, 1))
        return logits.view(len(self.seeds), len(x), *logits.shape[1:])

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Let the layers compute with the held draws for a while."""
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
    """Whether any layer of the model draws, in the mode that it is in. A `Sampled` does not."""
    return next(_random_layers(model), None) is not None


def draws_in_eval_mode(model: nn.Module) -> bool:
    """Whether any layer draws in eval mode too, or holds a draw: then the model is no plain network to be traced."""
    kinds = ((module, _adapter(module)) for module in model.modules())
    return any(
        isinstance(module, Sampled) or (kind is not None and kind is not _TRAINING and kind.active(module))
        for module, kind in kinds
    )


def require_randomized(model: nn.Module, what: str) -> None:
    """Raise InvalidInputError unless the model is randomized.

    Args:
        model: To look into.
        what: Needs the randomness, for the message.
    """
    if not is_randomized(model):
        raise InvalidInputError(
            f"{what} needs a randomized network, and no layer of this {type(model).__name__} draws anything: make one "
            "by lirpa_ext.randomized.make_rse or make_adv_bnn, or name its layers in "
            "lirpa_ext.randomized.sampling.ADAPTERS"
        )


def sample(model: nn.Module, generator: torch.Generator, draws: int = 1) -> Sampled:
    """Draw networks from a randomized one, and hold them.

    The n-th draw is the same whether networks are drawn one by one or together.

    Args:
        model: Randomized network; a deterministic one is its only draw.
        generator: Source of the draws; the next call draws others.
        draws: How many, default 1: the result then maps (B, ...) to (B, classes) as the model does.

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
        draws: Networks of the ensemble; the source takes 20.
        generator: Source of the draws, default a new one of seed 0.
        by: "probability" (default) or "vote"; a network votes for its largest logit, the first one of a tie.

    Returns:
        (B, classes), rows sum to 1. Rows of a network that gives NaN are NaN, so that no comparison holds for them.

    Raises:
        InvalidInputError: `draws` is below 1, or `by` unknown.
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
            shares = votes + 0 * shares.sum(-1, keepdim=True)  # NaN stays
        total = total + shares.sum(0)
    assert isinstance(total, Tensor)
    return total / draws


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator of this seed; the numbers of a draw depend on the device."""
    return torch.Generator(device).manual_seed(seed)
