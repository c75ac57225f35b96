"""A rule: the set of a node of the engine's that has none. Here torch.gather with a constant index."""

import math

from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.rules import SetRule, register_rule


class Picked(SetRule):
    """The box is that of the picked entries; each entry may be picked as often as there are places, n at most, which
    stretches lengths by sqrt(n)."""

    exact = True  # nothing is rounded

    def propagate(self, node, inputs, center, context):
        state, index = inputs
        if isinstance(index, BallBox):
            return None  # declined: the index depends on the input
        lower, upper = (node.forward(end, index) for end in state.box())
        return BallBox(center, state.radius * math.sqrt(center[0].numel()), lower, upper).tightened()


register_rule("BoundGatherElements", Picked())
