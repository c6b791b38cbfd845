"""Writes models for other programs, and reads theirs: model folders and GGUF, each proved after writing."""
