"""One pass over a graph: forward with balls and boxes, or boxes alone; backward with rows of coefficients."""
