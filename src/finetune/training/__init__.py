"""Changes weights, one optimizer step at a time. Verb: train.

`LoopPlan` + a `ports.Session` -> `train` -> events.
"""
