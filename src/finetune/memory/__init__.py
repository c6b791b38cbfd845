"""Tells what memory a run needs and what it took. Verbs: estimate (before), measure (for real)."""
