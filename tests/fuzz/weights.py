"""Numbers of weights. The source of these two functions becomes part of every program that is printed."""

import torch


def numbers(shape, seed, how=1.0):
    """Numbers of that shape, the same for the same seed: normal ones times `how`, or of a kind that `how` names."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = draw.reshape(shape[0], -1) if len(shape) > 1 else draw.reshape(1, -1)
    if how == "orthogonal":
        left, _, right = torch.linalg.svd(rows, full_matrices=False)
        draw = left @ right
    elif how == "dominant":  # one direction much larger than the others
        draw = 3 * rows[:, :1] * rows[:1] + 0.01 * rows
    elif how == "integer":  # ties
        draw = rows.round()
    else:
        draw = rows * {"zero": 0.0}.get(how, how) / max(1, rows.shape[1] if len(shape) > 1 else 1) ** 0.5
    return draw.reshape(shape).float()


def filled(module, seed, how=1.0):
    """The module with weights drawn anew; scales and statistics of normalizations are ordinary numbers."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                drawn = numbers(tuple(tensor.shape), seed, how if tensor.dim() > 1 else 1.0)
                tensor.copy_(drawn.abs() + 0.3 if name == "running_var" else drawn)
                seed += 1
    return module
