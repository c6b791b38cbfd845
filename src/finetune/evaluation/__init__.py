"""Finds out what a model can do. Verbs: ask (score answers), check (a saved adapter still works)."""
