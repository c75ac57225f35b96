"""The engine's class of perturbations, made right: `LpBall` behind the interface that the engine asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import engine
from ..errors import InvalidInputError, OptionError
from .lengths import flat
from .lp_ball import LpBall

# The exact minimum is affordable for the rows of an output, not for the engine's rows of each neuron of hidden layers.
_MOST_EXACT_ROWS = 256


class PerturbationLpNorm(LpBall, engine.EnginePerturbationLpNorm):  # type: ignore[misc]
    """The set {x' : ||x' - x||_p <= eps, x_L <= x' <= x_U}, one for each sample of the batch.

    Takes the place of the engine's class of the same name and works in all of its methods. It differs in
    three ways: `eps` may be one number for each sample; the range [x_L, x_U] is honoured for every norm (the
    engine ignores it unless the norm is inf); and with norm inf an explicit `eps` is intersected with the
    range, where the engine forgets `eps`. Leave `eps` out to mean the box [x_L, x_U] itself.

    Args:
        eps: Radius in units of the input; a number or a tensor of shape (B,). None: [x_L, x_U] alone.
        norm: p of the lp norm, 1 <= p <= inf. Default inf, as in the engine.
        x_L: Lower end of the data range; a number or a tensor that broadcasts to the input.
        x_U: Upper end of the data range.

    Raises:
        InvalidInputError: `eps` is negative, NaN, infinite or of a wrong shape; the range is empty or, with eps > 0,
            a single point; p < 1.
    """

    def __init__(
        self,
        eps: float | Tensor | None = None,
        norm: float = math.inf,
        x_L: float | Tensor | None = None,
        x_U: float | Tensor | None = None,
    ) -> None:
        LpBall.__init__(self, eps, norm, x_L, x_U)
        with np.errstate(divide="ignore"):  # the dual of norm 1
            engine.EnginePerturbationLpNorm.__init__(self, eps=0.0 if eps is None else eps, norm=self.norm)

    @classmethod
    def of(cls, perturbation: Any, x: Tensor | None = None) -> PerturbationLpNorm:
        """The set of an engine's own `PerturbationLpNorm` as this class; an instance of this class is returned as is.

        The engine takes x_L and x_U for the ends of an l-inf box, in place of x - eps and x + eps, and ignores both
        for every other norm.

        Args:
            perturbation: A perturbation of the engine or of this package.
            x: Center of the set, (B, ...); needed for an l-inf box with only one of x_L and x_U.

        Raises:
            InvalidInputError: The perturbation is of another class (synonyms, l0, linear constraints), or needs `x`.
        """
        if isinstance(perturbation, cls):
            return perturbation
        if type(perturbation) is not engine.EnginePerturbationLpNorm:
            raise InvalidInputError(
                f"{type(perturbation).__name__} is not an lp ball; the methods of lirpa_ext take PerturbationLpNorm"
            )
        x_L, x_U, norm = perturbation.x_L, perturbation.x_U, float(perturbation.norm)
        if norm != math.inf or (x_L is None and x_U is None):
            return cls(perturbation.eps, norm)
        if (x_L is None or x_U is None) and x is None:
            raise InvalidInputError("of an l-inf box with one end given the center is needed")
        return cls(
            None, norm, x - perturbation.eps if x_L is None else x_L, x + perturbation.eps if x_U is None else x_U
        )

    def engines_box(self, x: Tensor) -> Any:
        """The same set as an instance of the engine's own class, for its dynamic forward mode, which takes only boxes.

        Args:
            x: Center of the set, (B, ...).

        Raises:
            OptionError: The norm is not inf, so that the set is no box.
        """
        if self.norm != math.inf:
            raise OptionError(f"the engine's dynamic forward mode takes l-inf sets only, not norm {self.norm:g}")
        lower, upper = self.box(x)
        return engine.EnginePerturbationLpNorm(norm=math.inf, x_L=lower, x_U=upper)

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> tuple[Any, Tensor, None]:
        """Bounds of the input with which the engine's IBP and forward mode start: the box, for every norm.

        Args:
            x: Center of the set, (B, ...).
            aux: Ignored.
            forward: Whether to add the identity as linear bounds, for the forward mode. Default False.
        """
        self.sparse = False
        lower, upper = self.box(x)
        if not forward:
            return engine.LinearBound(None, None, None, None, lower, upper), x, None
        size = x[0].numel()
        eye = torch.eye(size, dtype=x.dtype, device=x.device).expand(len(x), size, size)
        weight, bias = eye.reshape(len(x), size, *x.shape[1:]), torch.zeros_like(x)
        return engine.LinearBound(weight, bias, weight, bias, lower, upper), x, None

    def concretize(self, x: Tensor, A: Any, sign: int = -1, *_: Any, **__: Any) -> Tensor | None:
        """Lower (sign -1) or upper (sign +1) bound of A x' over the set.

        Args:
            x: Center of the set, (B, ...).
            A: Coefficients: a tensor (B, S, ...), or in the engine's own forms (identity, patches).
            sign: -1 (default) or +1.

        Returns:
            (B, S), or the shape that the engine expects for its patches; None if `A` is None.
        """
        if A is None:
            return None
        if isinstance(A, engine.eyeC) or (isinstance(A, engine.Patches) and A.identity):
            lower, upper = self.box(x)
            bound = lower if sign < 0 else upper
            return bound if engine.IS_LEGACY and isinstance(A, engine.Patches) else flat(bound)
        rows = engine.patches_to_matrix(A, x.shape) if isinstance(A, engine.Patches) else A
        rows = rows.reshape(rows.shape[0], rows.shape[1], -1)
        exact = rows.shape[1] <= _MOST_EXACT_ROWS
        bound = -self.minimum(-rows, x, exact) if sign > 0 else self.minimum(rows, x, exact)
        if engine.IS_LEGACY and isinstance(A, engine.Patches) and A.unstable_idx is None:
            return bound.view(len(x), A.patches.size(0), A.patches.size(2), A.patches.size(3))
        return bound
