"""Specifications to certify: labels, margins and specification rows of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidInputError


def check_labels(y: Tensor, classes: int) -> None:
    """Check that labels are whole numbers from 0 to classes - 1.

    Args:
        y: Labels, (B,).
        classes: Number of classes, at least 2.

    Raises:
        InvalidInputError: `y` has another type, shape or range, or there are fewer than 2 classes.
    """
    if classes < 2:
        raise InvalidInputError(f"a margin needs at least 2 classes, the model has {classes}")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InvalidInputError(f"labels must be whole numbers of shape (B,), got {y.dtype} of shape {tuple(y.shape)}")
    outside = ((y < 0) | (y >= classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise InvalidInputError(
            f"{len(outside)} of {len(y)} labels are outside of the model's classes 0..{classes - 1}; "
            f"the first is {int(y[first])}, of sample {first}"
        )


def margin_rows(
    y: Tensor, classes: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """Rows e_y - e_j for every j != y, in order of j: C f(x) > 0 in every row says that f predicts y.

    Args:
        y: Labels, (B,).
        classes: Number of classes, at least 2.
        dtype: Type of the rows, default float64.
        device: Device of the rows, default that of `y`.

    Returns:
        (B, classes - 1, classes).

    Raises:
        InvalidInputError: As `check_labels`.

    >>> margin_rows(torch.tensor([1]), 3)
    tensor([[[-1.,  1.,  0.],
             [ 0.,  1., -1.]]], dtype=torch.float64)
    """
    check_labels(y, classes)
    y = y.to(device=device, dtype=torch.long) if device is not None else y.long()
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    rows = eye[y].unsqueeze(1) - eye
    others = torch.arange(classes, device=y.device) != y.unsqueeze(1)
    return rows[others].view(len(y), classes - 1, classes)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Margin of each sample, min over j != y of z_y - z_j: positive where `y` is predicted, 0 at a tie.

    Args:
        logits: z, (B, classes).
        y: Labels, (B,).

    Returns:
        (B,); NaN where a logit is NaN.
    """
    own = logits.gather(1, y.unsqueeze(1))
    return (own - logits).scatter(1, y.unsqueeze(1), torch.inf).amin(1)


def identity_rows(values: Tensor, sign: int = 1) -> Tensor:
    """Specification rows of the values themselves, or of their negatives.

    Args:
        values: Values of a node, (B, ...), n of them for each sample.
        sign: 1 or -1.

    Returns:
        Sign times the identity, (1, n, n).
    """
    return sign * torch.eye(values[0].numel(), dtype=values.dtype, device=values.device).unsqueeze(0)
