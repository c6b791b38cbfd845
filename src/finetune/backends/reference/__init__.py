"""Trains in plain NumPy: a float64 Llama whose gradients are written out by hand, the specification of what we train.

Files: backend (create, open), weights (files to arrays), model (forward and backward), adapter (LoRA and its files),
optimizer (AdamW and clipping), session (verbs), state (save, load), reload.
"""
