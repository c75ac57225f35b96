"""The perturbation set: an lp ball around the input, per-sample radius, optionally cut to a data range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError
from .ball_box_min import ball_box_min
from .lengths import flat, length

if TYPE_CHECKING:
    from typing_extensions import Self

# A data range tensor in which no sample can move by more than this part of eps is taken for a mistake.
_NARROW = 1e-3


_MEANT = (
    "is larger than 0: the bound would be of hardly more than the input itself. Leave x_L and x_U out to mean the "
    "ball, or, with norm=inf, leave eps out to mean the box from x_L to x_U"
)


class LpBall:
    """The set {x' : ||x' - x||_p <= eps, x_L <= x' <= x_U}, one for each sample of the batch.

    Args:
        eps: Radius in units of the input; a number or a tensor of shape (B,). None: [x_L, x_U] alone.
        norm: p of the lp norm, 1 <= p <= inf. Default inf.
        x_L: Lower end of the data range; a number or a tensor that broadcasts to the input.
        x_U: Upper end of the data range.

    Raises:
        InvalidInputError: `eps` is negative, NaN, infinite or of a wrong shape; the range is empty or, with eps > 0,
            a single point; p < 1.
    """

    norm: float

    def __init__(
        self,
        eps: float | Tensor | None = None,
        norm: float = math.inf,
        x_L: float | Tensor | None = None,
        x_U: float | Tensor | None = None,
    ) -> None:
        norm = float(norm)
        if not norm >= 1:
            raise InvalidInputError(f"norm must be at least 1 (1, 2, ..., inf), got {norm}")
        if eps is None and (x_L is None or x_U is None or norm != math.inf):
            raise InvalidInputError("give eps, or for norm=inf both x_L and x_U (the box itself)")
        if eps is not None:
            check_eps(eps)
        for name, end in (("x_L", x_L), ("x_U", x_U)):
            if end is not None and torch.as_tensor(end).isnan().any():
                raise InvalidInputError(f"{name} has NaN entries")
        if x_L is not None and x_U is not None and (torch.as_tensor(x_L) > torch.as_tensor(x_U)).any():
            raise InvalidInputError("the data range is empty: some x_L > x_U")
        ends = [torch.as_tensor(end) for end in (x_L, x_U) if end is not None]
        if (
            eps is not None
            and [end.numel() for end in ends] == [1, 1]
            and ends[0] == ends[1]
            and torch.as_tensor(eps).max() > 0
        ):
            raise InvalidInputError(f"the data range is the single point {x_L}, where eps {_MEANT}")
        self.norm, self.radius = norm, eps
        self.range_lower, self.range_upper = x_L, x_U

    def check(self, x: Tensor) -> None:
        """Check the center `x`, (B, ...), against the set.

        Raises:
            InvalidInputError: `x` is not finite or lies outside of the data range, the range leaves next to nothing
                of the ball, or `eps` has another number of entries than 1 or B.
        """
        if not torch.isfinite(x).all():
            raise InvalidInputError("the input has NaN or infinite entries")
        if self.radius is None or (self.range_lower is None and self.range_upper is None):
            self.eps_of(x)  # x is the center, so inside
            return
        lower, upper = self.box(x)
        outside, stuck = torch.stack([((lower > x) | (upper < x)).any(), self._stuck(x)]).tolist()  # one GPU transfer
        if outside:
            raise InvalidInputError(
                f"the input leaves the data range: it spans [{x.min():.6g}, {x.max():.6g}], the range is "
                f"x_L={self.range_lower}, x_U={self.range_upper}. Normalize inside of the model, not in the data."
            )
        if stuck:
            raise InvalidInputError(
                f"the data range x_L, x_U leaves next to nothing of the ball around the input, less than {_NARROW:g} "
                f"of eps, which {_MEANT}"
            )

    def _stuck(self, x: Tensor) -> Tensor:
        """Whether no sample of radius > 0 can move in its range by more than a small part of the radius.

        Only for ranges given as tensors: a range of two numbers is that of a data format, and may be small beside eps,
        while x_L = x_U = x is a mistake.
        """
        ends = (self.range_lower, self.range_upper)
        if any(end is None for end in ends) or max(torch.as_tensor(end).numel() for end in ends) == 1:
            return torch.zeros((), dtype=torch.bool, device=x.device)
        low, high = self._range(x, "range_lower", x), self._range(x, "range_upper", x)
        reach = length(flat(torch.maximum(high - x, x - low)), order=self.norm)
        eps = self.eps_of(x)
        return (eps > 0).any() & ((eps == 0) | (reach <= _NARROW * eps)).all()

    def take(self, index: Tensor, x: Tensor) -> Self:
        """The sets of some samples.

        Args:
            index: Indices of the samples, (K,), which may repeat.
            x: Centers of the whole batch, (B, ...).
        """

        def some(value: Any, batched: bool) -> Any:
            return value[index] if batched and len(value) == len(x) else value

        radius = self.radius
        ends = (self.range_lower, self.range_upper)
        return type(self)(
            some(radius, isinstance(radius, Tensor) and radius.dim() == 1 and len(x) > 1),
            self.norm,
            *(some(end, isinstance(end, Tensor) and end.dim() == x.dim()) for end in ends),
        )

    def eps_of(self, x: Tensor) -> Tensor:
        """Radius of each sample, in units of the input; for a box without eps the largest distance of a face from `x`.

        Args:
            x: Center of the set, (B, ...).

        Returns:
            (B,).

        Raises:
            InvalidInputError: `eps` has another number of entries than 1 or B.
        """
        if self.radius is None:
            lower, upper = self.box(x)
            return flat(torch.maximum(upper - x, x - lower)).amax(1)
        eps = torch.as_tensor(self.radius, dtype=x.dtype, device=x.device)
        if eps.dim() > 0 and eps.numel() not in (1, len(x)):
            raise InvalidInputError(f"eps has {eps.numel()} entries for a batch of {len(x)}")
        return eps.reshape(-1).expand(len(x)) if eps.numel() == 1 else eps.reshape(-1)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Box around the set: that of the ball, cut to the data range.

        Args:
            x: Center of the set, (B, ...).

        Returns:
            Lower and upper corner, (B, ...) each.
        """
        if self.radius is None:
            return self._range(x, "range_lower", x), self._range(x, "range_upper", x)
        eps = self.eps_of(x).view(-1, *[1] * (x.dim() - 1))
        lower, upper = x - eps, x + eps
        if self.range_lower is not None:
            lower = torch.maximum(lower, self._range(x, "range_lower", x))
        if self.range_upper is not None:
            upper = torch.minimum(upper, self._range(x, "range_upper", x))
        return lower, upper

    def towards(self, x: Tensor, direction: Tensor) -> Tensor:
        """The point on the border of the lp ball in a direction from the center, clipped to the data range.

        Args:
            x: Center of the set, (B, ...).
            direction: Direction, (B, ...), of any length.

        Returns:
            (B, ...).
        """
        view = (-1, *[1] * (x.dim() - 1))
        size = torch.linalg.vector_norm(flat(direction), ord=self.norm, dim=1).clamp(min=1e-30).view(view)
        lower, upper = self.box(x)
        if self.radius is None:
            return lower + (upper - lower) * (1 + direction / size) / 2
        return torch.minimum(torch.maximum(x + direction / size * self.eps_of(x).view(view), lower), upper)

    def l2_radius(self, x: Tensor) -> Tensor:
        """Radius of an l2 ball around `x` that contains the set: N^(1/2 - 1/max(p, 2)) eps for N elements a sample.

        Args:
            x: Center of the set, (B, ...).

        Returns:
            (B,).
        """
        if self.radius is None:
            lower, upper = self.box(x)
            return length(flat(torch.maximum(upper - x, x - lower)))
        inverse_p = 0.0 if self.norm == math.inf else 1 / max(self.norm, 2.0)
        return self.eps_of(x) * x[0].numel() ** (0.5 - inverse_p)

    def minimum(self, a: Tensor, x: Tensor, exact: bool = True) -> Tensor:
        """Lower bound on min a.x' over the set for each row a; exact without a data range, and with one for p = 2, inf.

        Args:
            a: Coefficient rows, (B, S, N).
            x: Center of the set, (B, ...), with N elements a sample.
            exact: For p = 2 with a range, solve for the exact minimum of each row (default). False takes the better
                of the minima over ball and box, in a tenth of the time.

        Returns:
            (B, S).
        """
        center = flat(x)
        if self.norm == math.inf:
            lower, upper = (flat(end) for end in self.box(x))
            return rows_dot(a, (lower + upper) / 2) - rows_dot(a.abs(), (upper - lower) / 2)
        eps = self.eps_of(x).unsqueeze(1)
        dual = math.inf if self.norm == 1 else self.norm / (self.norm - 1)
        ball = rows_dot(a, center) - eps * length(a, order=dual)
        if self.range_lower is None and self.range_upper is None:
            return ball
        lower, upper = (flat(end) for end in self.box(x))
        if self.norm == 2 and exact:
            return torch.maximum(ball, ball_box_min(a, center, self.eps_of(x), lower, upper))
        box = rows_dot(a, (lower + upper) / 2) - rows_dot(a.abs(), (upper - lower) / 2)
        return torch.maximum(ball, box)

    def _range(self, x: Tensor, name: str, like: Tensor) -> Tensor:
        return torch.as_tensor(getattr(self, name), dtype=x.dtype, device=x.device).expand_as(like)

    def __repr__(self) -> str:
        return (
            f"PerturbationLpNorm(norm={self.norm}, eps={self.radius}, x_L={self.range_lower}, x_U={self.range_upper})"
        )


def check_eps(eps: float | Tensor) -> None:
    """Raise InvalidInputError unless every radius is finite and at least 0, in a scalar or a vector (B,)."""
    values = torch.as_tensor(eps, dtype=torch.float64) if not isinstance(eps, np.ndarray) else torch.from_numpy(eps)
    if values.dim() > 1:
        raise InvalidInputError(f"eps must be a number or have shape (B,), got shape {tuple(values.shape)}")
    if not torch.isfinite(values).all() or (values < 0).any():
        raise InvalidInputError(f"eps must be finite and not negative, got {eps}")


def rows_dot(a: Tensor, x: Tensor) -> Tensor:
    """Dot product of each coefficient row with its sample: (B, S, N), (B, N) -> (B, S)."""
    return torch.einsum("bsn,bn->bs", a, x)
