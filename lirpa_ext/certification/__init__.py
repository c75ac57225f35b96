"""Certified accuracy of a classifier on a data set, its results and reports; robust accuracy of randomized models."""
