"""The learning rate of each optimizer step, in closed form."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_at(
    step: int, total_steps: int, *, learning_rate: float, warmup_steps: int, schedule: Schedule
) -> float:
    """The learning rate of optimizer step `step`, counted from 1 to `total_steps`.

    It rises linearly over the first `warmup_steps` steps and reaches `learning_rate` at their end, or at step 1 without
    warm-up. Afterwards it stays (constant) or falls to reach zero just after the last step.

    Source: the warm-up and cosine schedules of the `transformers` library, over optimizer steps.
    """
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    if schedule == "constant":
        return learning_rate
    done = (step - max(warmup_steps, 1)) / (total_steps + 1 - max(warmup_steps, 1))
    return learning_rate * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
