"""Tells trackers of a run as it goes: TensorBoard, Trackio, Weights & Biases, MLflow. Verb: track.

`Trackers` takes events; each tracker is a file of its own, imported when it is asked for, and none can harm a run.
"""
