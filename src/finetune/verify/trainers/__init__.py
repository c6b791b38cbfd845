"""Trainers that the suite can be pointed at, each answering as `doors.answers` says."""
