"""What may be called a bound: which of the engine's bounds are known to hold, and whether a graph is its model."""
