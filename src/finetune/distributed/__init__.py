"""Trains one model in several processes: which process this is, what they share, and how they start."""
