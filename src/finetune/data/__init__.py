"""Reads data files and brings every row into one form. Verb: read.

`read_rows` -> `shape_rows` -> `hold_out`; `facts` makes the deterministic data set.
"""
