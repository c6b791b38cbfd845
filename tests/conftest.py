"""Loads the Hypothesis profile, counts the cases of a run, and tells how to replay its failures."""

from finetune_strategies.profiles import load_profile
from finetune_strategies.replay import (
    pytest_addoption,
    pytest_collection_finish,
    pytest_configure,
    pytest_runtest_call,
)

__all__ = [
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_runtest_call",
]

load_profile()
