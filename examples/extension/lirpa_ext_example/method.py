"""A method: the better of two, row by row, with the options of the method that it wraps."""

from dataclasses import replace

import torch

from lirpa_ext.methods import find_method, register_method


def best_of_orders(problem, *, also="slope:ibp", **options):
    """bcp-crown's bounds, or those of another method where they are tighter: both hold."""
    first, second = find_method("bcp-crown")(problem, **options), find_method(also)(problem)
    lower = None if first.lower is None else torch.maximum(first.lower, second.lower)
    upper = None if first.upper is None else torch.minimum(first.upper, second.upper)
    return replace(first, lower=lower, upper=upper)


register_method("best-of-orders", best_of_orders, wraps="bcp-crown")
