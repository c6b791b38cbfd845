"""Judges a trainer, ours or anybody's, by what it does and leaves behind.

`catalogue` has every law, `laws` their checks, `subjects` the ways to reach a trainer, `judge` and `run` draw cases and
hold it to them, `stateful` kills its processes, `findings` keeps what failed and `replay` tries it again; `faults` and
`prove` hold the laws themselves to real bugs.
"""
