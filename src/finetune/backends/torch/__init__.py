"""Trains with torch and PEFT. Files: backend (open), session (verbs), state (save, load), probe, reload."""

import os

from finetune.backends import importing_libraries

# Threads of a product that wait for each other sleep. By default they spin, and where other programs keep the cores
# busy they take the very time that the slowest of them waits for: two threads then take twice as long as they need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

with importing_libraries():
    import transformers.modeling_utils  # noqa: F401 - and with it torch
