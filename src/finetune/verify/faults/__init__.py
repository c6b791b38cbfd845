"""Faults to plant in our own trainer, each a real one of somebody's: a suite is worth what it catches of them."""
