"""Joins neighbouring rooms for the pipeline. Verbs: prepare (config to ids), observe (a session), record (run.json)."""
