"""Changes weights, one optimizer step at a time. Verb: train.

`LoopPlan` + a `ports.Session` -> `train` -> events; `EarlyStopping` says when to stop, and which step was best.
"""
