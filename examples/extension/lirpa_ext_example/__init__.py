"""One extension of each kind. lirpa_ext imports this module, which the entry point names; each file registers one."""

from . import activation, analysis, attack, data, loss, lowering, method, rule

__all__ = ["activation", "analysis", "attack", "data", "loss", "lowering", "method", "rule"]
