"""Asks a session or a saved model: answers, losses, memory, and how far two ways to compute it differ."""
