"""Trains with torch and PEFT. Files: backend (open), session (verbs), state (save, load), probe, reload."""

from finetune.backends import importing_libraries

with importing_libraries():
    import transformers.modeling_utils  # noqa: F401 - and with it torch
