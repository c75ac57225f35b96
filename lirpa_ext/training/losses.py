"""Losses of certified training: cross entropy of the clean and of the worst-case logits, mixed, fused, regularized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..domain.perturbation import PerturbationLpNorm
from ..domain.specifications import check_labels, margin_rows
from ..engine import BoundedTensor
from ..errors import InvalidInputError
from ..methods import label_option
from ..methods.clean_value import held
from ..module.bounded_module import BoundedModule
from ..randomized.sampling import is_randomized

__all__ = [
    "certified_loss",
    "clean_and_worst_logits",
    "fused_cross_entropy",
    "mixed_loss",
    "relu_stability_loss",
    "worst_case_logits",
]


def worst_case_logits(
    net: BoundedModule | nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    method: str = "bcp",
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    *,
    logits: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Logits of the worst case of each class on its own, z + t with t_m = (z_y - z_m) - min (zeta_y - zeta_m).

    The worst-translated logits (Definition 3.1.1) of S. Lee's dissertation (2021), for every method; the minimum is
    over the method's outer bound, which makes entry m equal to z_y minus the lower bound of margin m, and entry y
    equal to z_y. Their cross entropy is at least that of f(x') for every admissible x' (Proposition 3.1.1), if the
    method's bound is one: with ``norms="estimate"``, for training, it is none.

    Args:
        net: The classifier's graph, (B, ...) -> (B, classes). A torch module is traced anew in each call.
        x: Inputs, (B, ...).
        y: Labels, (B,). Methods that take ``labels`` get them too.
        eps: Radius in units of the input, one number or (B,).
        method: Any method of `BoundedModule.compute_bounds`, default "bcp".
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        logits: Clean logits of x, (B, classes), if at hand: saves a forward pass.
        **options: Options of the method.

    Returns:
        (B, classes), differentiable in the model's parameters.

    Raises:
        InvalidInputError: Labels that are no class; eps, range or x as in `BoundedModule.compute_bounds`.

    Example:
        >>> from lirpa_ext import BoundedModule
        >>> model, x, y = torch.nn.Linear(2, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> model.weight.data, model.bias.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2)
        >>> worst_case_logits(BoundedModule(model, x), x, y, eps=0.1).detach()
        tensor([[3.0000, 0.5000]])
    """
    bounded = net if isinstance(net, BoundedModule) else BoundedModule(net, x)
    return clean_and_worst_logits(bounded, x, y, eps, method, norm, x_L, x_U, logits=logits, **options)[1]


def clean_and_worst_logits(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    method: str = "bcp",
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    *,
    logits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Clean logits of x and those of `worst_case_logits`, whose arguments it takes.

    Without `logits`, the clean ones are those that the bound is computed of, where its method propagates a ball: one
    forward pass and its backward pass less in a training step.

    Returns:
        (B, classes) each, differentiable in the model's parameters.
    """
    classes = math.prod(bounded.final_node().output_shape[1:])
    if len(bounded.final_node().output_shape) != 2 or (logits is not None and logits.shape != (len(x), classes)):
        given = bounded.final_node().output_shape if logits is None else logits.shape
        raise InvalidInputError(f"logits must be ({len(x)}, classes), got {tuple(given)}")
    if y.shape != (len(x),):
        raise InvalidInputError(f"there are {len(x)} inputs, and labels of shape {tuple(y.shape)}")
    rows = margin_rows(y, classes, x.dtype, x.device)
    perturbed = BoundedTensor(x, PerturbationLpNorm(eps, norm, x_L, x_U))
    options = label_option(method, y) | options
    result = bounded.bound((perturbed,), rows, method, bound_upper=False, **options)
    margins, clean = result.lower, result.clean
    held_already = logits is not None or clean is not None  # by the method, or there are other logits than the graph's
    if logits is None:
        logits = bounded.source(x) if clean is None else clean
    if not (held_already or options.get("norms") == "estimate" or is_randomized(bounded.source)):
        margins, _ = held((margins, None), logits, rows, method, bounded, recording=True)
    assert margins is not None
    # The label's own margin, 0, goes back to its place among the others, which are in order of the class.
    own = logits.gather(1, y.to(logits.device, torch.long).unsqueeze(1))
    label = functional.one_hot(y.long(), classes).bool().to(logits.device)
    return logits, own - torch.zeros_like(logits).masked_scatter(~label, margins)


def certified_loss(logits: Tensor, worst_logits: Tensor, y: Tensor, weight: float) -> Tensor:
    """(1 - weight) CE(logits, y) + weight CE(worst_logits, y), equation (3.2.13): `weight` is of the robust part.

    Args:
        logits: Clean logits, (B, classes).
        worst_logits: Worst-translated logits, (B, classes).
        y: Labels, (B,).
        weight: In [0, 1].

    Returns:
        Mean over the batch, 0-dim.

    Raises:
        InvalidInputError: `weight` is outside of [0, 1], or a label is no class.

    Example:
        >>> clean, worst = torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 2.0]])
        >>> certified_loss(clean, worst, torch.tensor([0]), weight=1.0)
        tensor(0.6931)
    """
    if not 0 <= weight <= 1:
        raise InvalidInputError(f"weight is the share of the robust loss and lies in [0, 1], got {weight}")
    check_labels(y, logits.shape[1])
    clean, worst = (functional.cross_entropy(values, y.long()) for values in (logits, worst_logits))
    return (1 - weight) * clean + weight * worst


def mixed_loss(logits: Tensor, first: Tensor, second: Tensor, y: Tensor, kappa: float, beta: float) -> Tensor:
    """kappa CE(logits, y) + (1 - kappa) CE((1 - beta) first + beta second, y), equation (C.1.1).

    `kappa` is the weight of the natural loss (`certified_loss` has that of the robust one). The mean of two bounds
    on each margin is one, so the second term is at least every admissible input's cross entropy.

    Args:
        logits: Clean logits, (B, classes).
        first: Worst-case logits of one method, in the source IBP, (B, classes).
        second: Those of another.
        y: Labels, (B,).
        kappa: In [0, 1].
        beta: Weight of `second`, in [0, 1].

    Returns:
        Mean over the batch, 0-dim.

    Raises:
        InvalidInputError: A weight is outside of [0, 1], or a label is no class.

    Example:
        >>> clean, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> loose, tight = torch.tensor([[2.0, 3.0]]), torch.tensor([[2.0, 1.0]])
        >>> mixed_loss(clean, loose, tight, y, kappa=0.0, beta=0.5)
        tensor(0.6931)
    """
    for name, weight in (("kappa", kappa), ("beta", beta)):
        if not 0 <= weight <= 1:
            raise InvalidInputError(f"{name} must lie in [0, 1], got {weight}")
    return certified_loss(logits, torch.lerp(first, second, beta), y, 1 - kappa)


def fused_cross_entropy(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    method: str = "sparse-slope",
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Upper bound of each sample's cross entropy over its set, by one row in place of one a class.

    Looser than the cross entropy of `worst_case_logits` of the same method, never above that of IBP, and several
    times cheaper (`lirpa_ext.passes.fusion`). The labels are an argument of each call; nothing of a batch stays behind.

    Args:
        bounded: The classifier's graph, (B, ...) -> (B, classes).
        x: Inputs, (B, ...).
        y: Labels, (B,).
        eps: Radius in units of the input, one number or (B,).
        method: "sparse-slope" (default) or "slope:..." (but "slope:ibp").
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        **options: Options of the method.

    Returns:
        (B,), differentiable in the model's parameters.

    Raises:
        OptionError: The method has no ``loss_fusion``.
        InvalidInputError: As in `worst_case_logits`.
    """
    perturbed = BoundedTensor(x, PerturbationLpNorm(eps, norm, x_L, x_U))
    _, upper = bounded.compute_bounds(
        x=(perturbed,), method=method, bound_lower=False, labels=y, loss_fusion=True, **options
    )
    return upper.squeeze(1)


def relu_stability_loss(
    bounded: BoundedModule,
    x: Tensor,
    eps: float | Tensor,
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
) -> Tensor:
    """RS regularizer (C.13): sum of -tanh(1 + u l) over the neurons, u and l the IBP bounds before their ReLU.

    It falls as bounds l < 0 < u move to one side. K. Xiao et al., Training for faster adversarial robustness
    verification via inducing ReLU stability, ICLR 2019.

    Args:
        bounded: The graph.
        x: Inputs, (B, ...).
        eps: Radius in units of the input, one number or (B,).
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.

    Returns:
        Mean over the batch, 0-dim, differentiable in the model's parameters.
    """
    boxes = bounded.activation_bounds(BoundedTensor(x, PerturbationLpNorm(eps, norm, x_L, x_U)))
    stability = [(1 + lower * upper).tanh().flatten(1).sum(1).mean() for lower, upper in boxes.values()]
    return -torch.stack(stability).sum() if stability else x.new_zeros(())
