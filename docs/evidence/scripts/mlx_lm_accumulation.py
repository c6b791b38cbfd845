"""mlx-lm: are two rows in two micro-batches learned as the two in one batch?"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs, train


class Small(nn.Embedding):
    """A model of one matrix: the logits of what follows each token."""

    layers: tuple[nn.Module, ...] = ()


def learned(batch: int, accumulate: int) -> np.ndarray:
    model = Small(8, 8)
    model.weight = mx.zeros((8, 8))
    rows = [([1, 2] * 16, 30), ([3, 4] * 16, 1)]  # few tokens to learn in one row, many in the other
    args = TrainingArgs(
        batch, accumulate, steps_per_report=9, adapter_file="/dev/null", grad_accumulation_steps=accumulate
    )
    train(model, mlx.optimizers.SGD(1.0), rows, None, args)
    return np.array(model.weight)


one, two = learned(2, 1), learned(1, 2)
print("expected: one update of token 1, two rows at once or one and one")
print(f"got: {np.abs(one[1]).max():.3f} and {np.abs(two[1]).max():.3f}")
