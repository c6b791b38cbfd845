"""Computes one model in several ways and compares them."""
