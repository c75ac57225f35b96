"""A fuzzer of the bounds: random networks, sets and calls, each bound attacked, each failure shrunk to a small program.

`operations` and its neighbours say what a network can be made of, `drawing` and `calls` draw one and what is asked of
it, `attack` looks for points that leave a bound, `check` runs a case, `shrink` makes a failing one small, `session` is
the loop that `make fuzz` runs.
"""
