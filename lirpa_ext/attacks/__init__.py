"""Attacks: a search for points of a perturbation set that a classifier gets wrong; it bounds robustness from above.

The base class `Attack` checks its input, projects points into the set, scores them and remembers the best point of each
sample; an attack implements only `Attack.run`. On a randomized model (`lirpa_ext.randomized`) each evaluation draws a
network, and `EOT` around any attack averages over draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from ..extensions import add, load_extensions
from .apgd import APGD
from .autoattack import AutoAttack
from .base import Attack, Attacked, Target
from .eot import EOT, mean_output
from .gradient import FGM, FGSM, PGD
from .losses import LOSSES, TARGETED_LOSSES
from .search import RandomSearch

__all__ = [
    "APGD",
    "ATTACKS",
    "EOT",
    "FGM",
    "FGSM",
    "LOSSES",
    "PGD",
    "TARGETED_LOSSES",
    "Attack",
    "Attacked",
    "AutoAttack",
    "RandomSearch",
    "Target",
    "make_attack",
    "mean_output",
    "register_attack",
]

ATTACKS: dict[str, Callable[..., Attack]] = {
    "apgd": APGD,
    "pgd": PGD,
    "fgsm": FGSM,
    "fgm": FGM,
    "search": RandomSearch,
}
"""Name -> class of an attack."""


def register_attack(name: str, attack: Callable[..., Attack], overwrite: bool = False) -> None:
    """Add an attack to `ATTACKS`, so that `lirpa_ext.certify`, configurations and studies can name it.

    Args:
        name: Name of the attack.
        attack: Class of the attack; its arguments are the options.
        overwrite: Whether to replace an attack of this name, default False.

    Raises:
        RegistrationError: The name is taken.
    """
    add(ATTACKS, "attack", name, attack, overwrite)


def make_attack(name: str, **options: Any) -> Attack:
    """Make an attack by name.

    Args:
        name: One of `ATTACKS`.
        **options: Arguments of the attack. ``steps`` and ``restarts`` are ignored by an attack without them.

    Raises:
        OptionError: There is no attack of that name, or it does not take the options.
    """
    load_extensions()
    if name not in ATTACKS:
        raise OptionError(f"unknown attack {name!r}; known are {', '.join(ATTACKS)}")
    known = inspect.signature(ATTACKS[name]).parameters
    given = {key: value for key, value in options.items() if key in known or key not in ("steps", "restarts")}
    try:
        return ATTACKS[name](**given)
    except TypeError as error:
        raise OptionError(f"attack {name!r}: {error}") from error
