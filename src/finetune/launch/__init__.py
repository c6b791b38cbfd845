"""Starts a run as several processes, through a launcher that others make and know. Verb: launch.

`Launch` -> `command` (its words) -> `watch` (started, listened to, judged by the notes that each process leaves).
"""
