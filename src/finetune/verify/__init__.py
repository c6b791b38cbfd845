"""Judges a trainer, ours or anybody's, by what it does and leaves behind. Verb: act, through a subject.

`subjects` is the door, `ours` stands behind it, `nursery` starts real processes fast, and `deaths` says how they end.
`stages` are what can be done, `laws` what must hold; `stories` are files of both, which a `theatre` tells to a subject
and `minimise` makes smaller.
"""
