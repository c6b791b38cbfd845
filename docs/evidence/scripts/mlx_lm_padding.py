"""mlx-lm: does the loss end where the row ends?"""

import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss


class Even:
    """A model that finds every token equally likely."""

    def __call__(self, inputs: mx.array) -> mx.array:
        return mx.zeros((*inputs.shape, 8))


row = mx.array([[5, 6, 7, 0, 0, 0]])  # three tokens, then padding with 0
_, tokens = default_loss(Even(), row, mx.array([[0, 3]]))
print("expected: 2 tokens to learn, 6 and 7")
print(f"got: {tokens.item()}")
