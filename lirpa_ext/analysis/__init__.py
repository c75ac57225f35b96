"""Analyses of tightness and smoothness: each is a function that returns numbers, and a plot made from them.

Numbers are frozen dataclasses with `rows`, `table`, `summary` and `save` (`lirpa_ext.analysis.results`); plots share
one style (`lirpa_ext.analysis.plots`).
"""
