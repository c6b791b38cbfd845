"""Keeps what a run makes, whole or not at all. Verb: write.

`RunFolder` lays out a run, `CheckpointStore` keeps its checkpoints, `write` makes files atomic.
"""
