"""Properties of networks: VNN-LIB, falsification, methods in turn, and splitting of the input."""
