"""Judges what was measured. Verb: judge. `Evidence` -> `judge` -> verdicts; it measures nothing itself."""
