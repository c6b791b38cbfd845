"""Finds models and reads what they are without loading them. Verb: locate.

`locate_model` -> `read_shape` -> `choose_layers`.
"""
