"""Trains with torch and PEFT. Files: backend (open), session (verbs), state (save, load), probe, reload."""
