"""A data set: two noisy rings, to be named in `--data rings`, in a configuration or by `load_data`."""

import torch

from lirpa_ext.data import register_data


def rings(split):
    """Points (N, 2) around the origin, and the ring that each is of."""
    source = torch.Generator().manual_seed(int(split == "test"))
    y = torch.arange(200) % 2
    angle, radius = 6.2832 * torch.rand(200, generator=source), 0.5 + y + 0.1 * torch.randn(200, generator=source)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


register_data("rings", rings)
