"""Registers the Hypothesis profiles, the only place where that happens."""

import os

from hypothesis import Phase, settings

settings.register_profile("fast", derandomize=True, deadline=None, print_blob=True, database=None, max_examples=60)
settings.register_profile("ci", settings.get_profile("fast"))
settings.register_profile("slow", deadline=None, print_blob=True, max_examples=1000)
settings.register_profile("debug", deadline=None, print_blob=True, max_examples=20, phases=list(Phase))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "fast")
