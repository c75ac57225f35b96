"""Certified accuracy of a classifier on a data set: its samples, results, reports and robust accuracy."""
