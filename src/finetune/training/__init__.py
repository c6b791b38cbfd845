"""Changes weights, one optimizer step at a time. Verb: train.

`LoopPlan` + a `ports.Session` -> `train` -> events; `Watch` says when enough is enough, and which step was best.
"""
