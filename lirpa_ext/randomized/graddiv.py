"""GradDiv: measures and regularizers of how concentrated the directions of the loss gradients of drawn networks are.

S. Lee, H. Kim, J. Lee: GradDiv: adversarial robustness of randomized neural networks via gradient diversity
regularization, 2021; S. Lee's dissertation (2021), 2.2.3 and A.2, whose equation numbers are cited below. Gradients
have the shape (n, B, ...) for n draws and B samples; each gradient is flattened to d numbers and divided by its length.
A gradient of length 0 has no direction and counts as orthogonal to all others, so that no result is ever NaN. Every
function is differentiable in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from .sampling import require_randomized, sample

__all__ = [
    "REGULARIZERS",
    "VonMisesFisher",
    "cosines",
    "dpp",
    "gradients",
    "kappa",
    "max_cosine",
    "mean_cosine",
    "mean_resultant_length",
    "smooth_max_cosine",
    "von_mises_fisher",
]

FLOOR = 1e-6  # least 1 - rho^2 in `kappa`, which would be infinite for gradients of one direction
JITTER = 1e-4  # added to the Gram matrix of `dpp`, which is singular for collinear gradients


def gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    n: int,
    generator: torch.Generator,
    create_graph: bool = True,
) -> Tensor:
    """Gradients of the cross entropy in the input for n drawn networks, in one forward and backward pass.

    Args:
        model: Randomized classifier, (B, ...) -> (B, classes). Batch norm in train mode takes its statistics over
            all n * B rows.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        n: Number of drawn networks, at least 1; Lee (2021) uses 3 in training.
        generator: Source of the draws.
        create_graph: Whether the result is differentiable in the parameters, default True.

    Returns:
        (n, B, d) with d = x[0].numel().

    Raises:
        InvalidInputError: The model is not randomized, or `n` is below 1.
    """
    require_randomized(model, "the diversity of gradients")
    drawn = sample(model, generator, n)
    points = x.detach().expand(n, *x.shape).flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(drawn(points), y.repeat(n), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points, create_graph=create_graph)
    return gradient.view(n, len(x), -1)


def mean_resultant_length(gradient: Tensor) -> Tensor:
    """Mean resultant length rho = ||mean of the directions||, in [0, 1]: 1 for gradients of one direction.

    Args:
        gradient: Gradients, (n, B, ...).

    Returns:
        (B,).

    Raises:
        InvalidInputError: n or d is below 2, or an entry is not finite.
    """
    return torch.linalg.vector_norm(_directions(gradient).mean(0), dim=-1)


def kappa(gradient: Tensor, form: str = "printed", normalized: bool = True, floor: float = FLOOR) -> Tensor:
    """Estimated concentration kappa of a von Mises-Fisher distribution of the directions; (2.2.16) if normalized.

    With rho the mean resultant length, kappa is rho (d - rho) / (1 - rho^2) as printed in (2.2.10), or
    rho (d - rho^2) / (1 - rho^2) as in A. Banerjee et al. (JMLR 2005). The second is larger by
    rho^2 / (1 + rho) < 1/2.

    Args:
        gradient: Gradients, (n, B, ...).
        form: "printed" (default) or "banerjee".
        normalized: Divide by d (default), to compare inputs of different sizes.
        floor: Least 1 - rho^2, default 1e-6: gradients of one direction have kappa (d - 1) / floor, not infinity.

    Returns:
        (B,), at least 0.

    Raises:
        InvalidInputError: As `mean_resultant_length`, or `form` is unknown, or `floor` is not positive.
    """
    if form not in ("printed", "banerjee"):
        raise InvalidInputError(f"form is 'printed' or 'banerjee', got {form!r}")
    if not floor > 0:
        raise InvalidInputError(f"floor must be positive, got {floor}")
    directions = _directions(gradient)
    d = directions.shape[-1]
    mean = directions.mean(0)
    rho = torch.linalg.vector_norm(mean, dim=-1)
    # 1 - rho^2 without cancellation: the mean square distance to the mean, plus the share of gradients of length 0
    lengths = directions.detach().square().sum(-1).round()
    spread = (directions - mean).square().sum(-1).mean(0) + (1 - lengths).mean(0)
    value = rho * (d - (rho if form == "printed" else rho.square())) / spread.clamp(min=floor)
    return value / d if normalized else value


def mean_cosine(gradient: Tensor) -> Tensor:
    """Mean cosine over all pairs of different gradients, (2.2.17), in [-1 / (n - 1), 1].

    Args:
        gradient: Gradients, (n, B, ...).

    Returns:
        (B,).

    Raises:
        InvalidInputError: As `mean_resultant_length`.
    """
    return _pairs(gradient).mean(-1)


def max_cosine(gradient: Tensor) -> Tensor:
    """Largest cosine over all pairs of different gradients (A.2), in [-1, 1].

    Args:
        gradient: Gradients, (n, B, ...).

    Returns:
        (B,).

    Raises:
        InvalidInputError: As `mean_resultant_length`.
    """
    return _pairs(gradient).amax(-1)


def smooth_max_cosine(gradient: Tensor) -> Tensor:
    """log of the sum of exp(cosine) over all pairs i != j (A.2); log(n (n - 1)) for orthogonal gradients.

    Args:
        gradient: Gradients, (n, B, ...).

    Returns:
        (B,).

    Raises:
        InvalidInputError: As `mean_resultant_length`.
    """
    return _pairs(gradient).logsumexp(-1)


def dpp(gradient: Tensor, jitter: float = JITTER) -> Tensor:
    """-log det of the Gram matrix K of the directions, (2.2.19): 0 for orthogonal gradients, else above 0.

    K is singular for collinear gradients, so that (1 - jitter) K + jitter I is taken instead. Its diagonal is still 1,
    and n gradients of one direction have -log(n - (n - 1) jitter) - (n - 1) log(jitter), not infinity.

    Args:
        gradient: Gradients, (n, B, ...).
        jitter: Share of the identity, in (0, 1], default 1e-4.

    Returns:
        (B,).

    Raises:
        InvalidInputError: As `mean_resultant_length`, or `jitter` is out of range.
    """
    if not 0 < jitter <= 1:
        raise InvalidInputError(f"jitter must lie in (0, 1], got {jitter}")
    gram = cosines(gradient)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return -torch.linalg.slogdet((1 - jitter) * gram + jitter * eye).logabsdet


REGULARIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "kappa": kappa,
    "kappa-banerjee": lambda gradient: kappa(gradient, "banerjee"),
    "mean": mean_cosine,
    "max": max_cosine,
    "smooth-max": smooth_max_cosine,
    "dpp": dpp,
}


class VonMisesFisher(NamedTuple):
    """Statistics of the directions of gradients, (B,) each.

    Attributes:
        rho: Mean resultant length, in [0, 1].
        printed: kappa as printed in (2.2.10), at least 0, not divided by d.
        banerjee: kappa as in A. Banerjee et al. (2005), not divided by d.
    """

    rho: Tensor
    printed: Tensor
    banerjee: Tensor


def von_mises_fisher(gradient: Tensor) -> VonMisesFisher:
    """Mean resultant length and both forms of kappa of gradients; Lee (2021) uses n = 100 draws.

    Args:
        gradient: Gradients, (n, B, ...).

    Raises:
        InvalidInputError: As `mean_resultant_length`.
    """
    forms = (kappa(gradient, form, normalized=False) for form in ("printed", "banerjee"))
    return VonMisesFisher(mean_resultant_length(gradient), *forms)


def cosines(gradient: Tensor) -> Tensor:
    """Cosines of all pairs of gradients.

    Args:
        gradient: Gradients, (n, B, ...).

    Returns:
        (B, n, n), with a diagonal of 1.

    Raises:
        InvalidInputError: As `mean_resultant_length`.
    """
    directions = _directions(gradient).transpose(0, 1)
    products = directions @ directions.mT
    eye = torch.eye(products.shape[-1], dtype=torch.bool, device=products.device)
    return products.masked_fill(eye, 1.0)


def _pairs(gradient: Tensor) -> Tensor:
    """Cosines of all ordered pairs of different gradients, (B, n (n - 1))."""
    found = cosines(gradient)
    n = found.shape[-1]
    different = ~torch.eye(n, dtype=torch.bool, device=found.device)
    return found[:, different]


def _directions(gradient: Tensor) -> Tensor:
    """Directions of gradients as unit vectors (n, B, d), 0 for a gradient of 0; scaled first against underflow.

    Gradients below 1e-32 in float32, as those of samples classified with certainty, count as 0: the derivative of
    their direction would overflow.
    """
    if gradient.dim() < 3 or gradient.shape[0] < 2:
        raise InvalidInputError(
            f"diversity is of 2 or more gradients, given as (n, B, ...); got shape {tuple(gradient.shape)}"
        )
    flat = gradient.flatten(2)
    if flat.shape[-1] < 2:
        raise InvalidInputError("directions need inputs of 2 or more numbers, got 1")
    if not torch.isfinite(flat.detach()).all():
        raise InvalidInputError("some gradients are not finite: the network overflows at these inputs")
    peak = flat.detach().abs().amax(-1, keepdim=True)
    known = peak > torch.finfo(peak.dtype).tiny ** 0.85
    scaled = torch.where(known, flat, 0.0) / torch.where(known, peak, 1.0)
    squared = scaled.square().sum(-1, keepdim=True)
    return scaled / torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt()
