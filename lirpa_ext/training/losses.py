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
    """Worst-translated logits of Lee (2021, Definition 3.1.1): z + t with t_m = (z_y - z_m) - min (zeta_y - zeta_m).

    The minimum is over the method's outer bound of the logits zeta, for each class m separately. So entry m is z_y
    minus the lower bound of the margin zeta_y - zeta_m, and entry y is z_y. Their cross entropy is an upper bound on
    that of f(x') for every admissible x' (Proposition 3.1.1) if the method's bound is sound; with ``norms="estimate"``,
    an option for training, it is not.

    Args:
        net: The classifier's graph, (B, ...) -> (B, classes). A torch module is traced anew in each call.
        x: Inputs, (B, ...).
        y: Labels, (B,). They are also passed to methods that take ``labels``.
        eps: Radius in units of the input, one number or (B,).
        method: Any method of `BoundedModule.compute_bounds`, default "bcp".
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        logits: Clean logits of x, (B, classes), if they are known; this may save a forward pass.
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
    """Clean logits of x and worst-case logits, as `worst_case_logits`.

    Without `logits`, the clean logits are taken from the bound's own forward pass, if the method propagates a ball;
    this saves one forward and backward pass in a training step.

    Args:
        bounded: The classifier's graph, (B, ...) -> (B, classes).
        x: Inputs, (B, ...).
        y: Labels, (B,).
        eps: Radius in units of the input, one number or (B,).
        method: Any method of `BoundedModule.compute_bounds`, default "bcp".
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        logits: Clean logits of x, (B, classes), if they are known.
        **options: Options of the method.

    Returns:
        Clean and worst-case logits, (B, classes) each, differentiable in the model's parameters.

    Raises:
        InvalidInputError: As `worst_case_logits`.
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
    # The bound is compared with the clean logits below, unless the method did so or the logits are not the graph's.
    held_already = logits is not None or clean is not None
    if logits is None:
        logits = bounded.source(x) if clean is None else clean
    if not (held_already or options.get("norms") == "estimate" or is_randomized(bounded.source)):
        margins, _ = held((margins, None), logits, rows, method, bounded, recording=True)
    assert margins is not None
    # `margins` has a column for each class but the label, in order of the class; the label's own margin is 0.
    own = logits.gather(1, y.to(logits.device, torch.long).unsqueeze(1))
    label = functional.one_hot(y.long(), classes).bool().to(logits.device)
    return logits, own - torch.zeros_like(logits).masked_scatter(~label, margins)


def certified_loss(logits: Tensor, worst_logits: Tensor, y: Tensor, weight: float) -> Tensor:
    """Certified loss of Lee (2021, 3.2.13): (1 - weight) CE(logits, y) + weight CE(worst_logits, y).

    Args:
        logits: Clean logits, (B, classes).
        worst_logits: Worst-translated logits, (B, classes).
        y: Labels, (B,).
        weight: Weight of the robust term, in [0, 1].

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
    """Mixed loss of Lee (2021, C.1.1): kappa CE(logits, y) + (1 - kappa) CE((1 - beta) first + beta second, y).

    `kappa` is the weight of the natural loss, whereas `certified_loss` takes the weight of the robust loss. A convex
    combination of two lower bounds on a margin is a lower bound, so the second cross entropy is an upper bound on that
    of every admissible input.

    Args:
        logits: Clean logits, (B, classes).
        first: Worst-case logits of one method, (B, classes); in Lee (2021) IBP.
        second: Worst-case logits of another method, (B, classes).
        y: Labels, (B,).
        kappa: Weight of the natural loss, in [0, 1].
        beta: Weight of `second` against `first`, in [0, 1].

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
    """Upper bound on each sample's cross entropy over its set, bounded as one function in place of one per class.

    The bound is looser than the cross entropy of `worst_case_logits` of the same method, never above that of IBP, and
    several times cheaper (`lirpa_ext.passes.fusion`).

    Args:
        bounded: The classifier's graph, (B, ...) -> (B, classes).
        x: Inputs, (B, ...).
        y: Labels, (B,).
        eps: Radius in units of the input, one number or (B,).
        method: "sparse-slope" (default) or "slope:..." (except "slope:ibp").
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
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
    """ReLU stability regularizer (Lee, 2021, C.13): sum of -tanh(1 + u l) over the neurons.

    l and u are the IBP bounds on the input of a ReLU. The term falls as an unstable neuron, l < 0 < u, becomes stable.
    K. Xiao et al., Training for faster adversarial robustness verification via inducing ReLU stability, ICLR 2019.

    Args:
        bounded: The classifier's graph.
        x: Inputs, (B, ...).
        eps: Radius in units of the input, one number or (B,).
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.

    Returns:
        Mean over the batch, 0-dim, differentiable in the model's parameters.
    """
    boxes = bounded.activation_bounds(BoundedTensor(x, PerturbationLpNorm(eps, norm, x_L, x_U)))
    stability = [(1 + lower * upper).tanh().flatten(1).sum(1).mean() for lower, upper in boxes.values()]
    return -torch.stack(stability).sum() if stability else x.new_zeros(())
