"""Nodes of the graph that are this package's own, or repaired ones of the engine's. Each has its rule beside it."""
