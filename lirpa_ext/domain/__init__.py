"""The sets that bound methods propagate, and their mathematics: perturbations, linear maps, norms, rounding."""
