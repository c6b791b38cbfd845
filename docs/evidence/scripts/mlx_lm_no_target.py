"""mlx-lm: what does a row do whose prompt leaves no room for its answer?"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, train


class Small(nn.Embedding):
    """A model of one matrix: the logits of what follows each token."""

    layers: tuple[nn.Module, ...] = ()


model = Small(8, 8)
rows = [([5] * 40, 36)]  # forty tokens, the first 36 of them the prompt; a row may be 32 long
args = TrainingArgs(batch_size=1, iters=1, steps_per_report=1, max_seq_length=32, adapter_file="/dev/null")
train(model, mlx.optimizers.Adam(1e-3), rows, None, args)
whole = all(mx.isfinite(weights).all().item() for _, weights in tree_flatten(model.parameters()))
print("expected: the row is left out and told, and the weights are finite")
print(f"got: the weights are {'finite' if whole else 'NaN'}")
