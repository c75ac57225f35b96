"""A loss: MTL-IBP (A. De Palma et al., Expressive losses for verified robustness, ICLR 2024)."""

from torch.nn.functional import cross_entropy

from lirpa_ext.training import register_loss


def mtl_ibp(step, alpha=0.5):
    """(1 - alpha) CE at the points of an attack + alpha CE of the worst case by IBP."""
    attacked, worst = step.attacked("pgd", steps=8), step.worst("slope:ibp")
    return (1 - alpha) * cross_entropy(attacked, step.y) + alpha * cross_entropy(worst, step.y)


register_loss("mtl-ibp", mtl_ibp, verify="bcp-crown")
