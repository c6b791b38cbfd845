"""Loads the Hypothesis profile, and keeps a history of sessions."""

import signal

from finetune_strategies.profiles import load_profile

pytest_plugins = ["finetune.verify.sessions"]

load_profile()

# A session that was started in the background ignores Ctrl-C, and so would every program that a law interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
