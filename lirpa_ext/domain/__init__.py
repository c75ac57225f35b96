"""What is propagated, and the mathematics of it: sets, perturbations, linear maps, norms, rounding."""
