"""Moves weights: AdamW and clipping, as torch defines them, on float32 arrays.

MLX's own AdamW leaves out the correction of the averages' start unless asked, and then makes it in float32, where
1 - 0.999 has five digits.
"""

import math
from collections.abc import Mapping

import mlx.core as mx

from finetune.adapters.kinds import lr_ratio_and_decay
from finetune.records import Optimization


class MlxAdamW:
    """AdamW with decoupled weight decay on matrices; its averages are float32 whatever the weights are.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101) and `torch.optim.AdamW`.
    """

    def __init__(self, weights: Mapping[str, mx.array], optimization: Optimization) -> None:
        self.optimization = optimization
        self.steps = 0
        self.first = {name: mx.zeros(weight.shape) for name, weight in weights.items()}
        self.second = {name: mx.zeros(weight.shape) for name, weight in weights.items()}

    def step(
        self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array], learning_rate: float
    ) -> dict[str, mx.array]:
        """The weights after one step: decayed, then moved against their averaged gradients."""
        beta1, beta2 = self.optimization.betas
        self.steps += 1
        # The square root, too, in Python's own doubles: one rounding less for each number.
        start = (1 - beta2**self.steps) ** 0.5
        moved = {}
        for name, weight in weights.items():
            gradient = gradients[name]
            first = self.first[name] + (1 - beta1) * (gradient - self.first[name])
            second = self.second[name] + (1 - beta2) * (gradient * gradient - self.second[name])
            factor, decay = lr_ratio_and_decay(self.optimization, name, weight.ndim)
            pace = learning_rate * factor
            rate = pace / (1 - beta1**self.steps)
            kept = weight.astype(mx.float32) * (1 - pace * decay)
            spread = mx.sqrt(second) / start + self.optimization.epsilon
            moved[name] = (kept - rate * first / spread).astype(weight.dtype)
            self.first[name], self.second[name] = first, second
        return moved


def clip(gradients: Mapping[str, mx.array], limit: float) -> tuple[dict[str, mx.array], float]:
    """All gradients scaled together so that their L2 norm is at most `limit`, and the norm before.

    Source: `torch.nn.utils.clip_grad_norm_`, with its 1e-6.
    """
    norm = math.hypot(*norms(gradients).values())
    factor = min(1.0, limit / (norm + 1e-6))
    return {name: gradient if factor == 1.0 else gradient * factor for name, gradient in gradients.items()}, norm


def norms(gradients: Mapping[str, mx.array]) -> dict[str, float]:
    """The L2 norm of each gradient."""
    found = {name: mx.linalg.norm(gradient) for name, gradient in gradients.items()}
    mx.eval(found)
    return {name: float(norm.item()) for name, norm in found.items()}
