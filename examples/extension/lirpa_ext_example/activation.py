"""An activation: x + sin(x)^2, "snake" (L. Ziyin et al., NeurIPS 2020), bounded on [-30, 30] by all methods."""

import math

from lirpa_ext.domain.scalar_functions import ScalarFunction
from lirpa_ext.nodes import register_activation


class Snake(ScalarFunction):
    """Its derivative 1 + sin(2x) turns at the odd multiples of pi / 4: rising before -pi/4 + k pi ... falling after."""

    turns = tuple(math.pi / 4 + k * math.pi / 2 for k in range(-24, 24))
    rising = tuple(k % 2 == 0 for k in range(-24, 25))

    def value(self, x):
        return x + x.sin() ** 2

    def derivative(self, x):
        return 1 + (2 * x).sin()


snake = register_activation("Snake", Snake())
