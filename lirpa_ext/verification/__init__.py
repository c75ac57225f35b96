"""Verification of properties: VNN-LIB files, counterexamples, bound methods in turn, and branch and bound."""
