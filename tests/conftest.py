"""Loads the Hypothesis profile, counts the cases of a run, tells how to replay its failures, and keeps a history."""

import signal

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
pytest_plugins = ["finetune.verify.sessions"]

load_profile()

# A session that was started in the background ignores Ctrl-C, and so would every program that a law interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
