"""Files made to do harm, by kind, and the reader of each kind.

A kind is a module with `read(source)` and a table `CASES`: name -> (maker, words). The maker writes files into a
folder and returns what to read; the words are a regular expression that the refusal must match, None for a file that
is fine.
"""

KINDS = ("arrays", "batches", "images", "networks", "properties", "checkpoints", "results", "configurations")
