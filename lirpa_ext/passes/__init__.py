"""Passes over a graph: forward with balls and boxes or with boxes alone, backward with coefficient rows."""
