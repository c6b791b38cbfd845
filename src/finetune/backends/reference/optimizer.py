"""Moves weights: AdamW and clipping, as torch defines them, on float64 arrays in place."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.kinds import lr_ratio_and_decay
from finetune.records import Optimization

Array = NDArray[np.float64]


class ReferenceAdamW:
    """AdamW with decoupled weight decay on matrices.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101) and `torch.optim.AdamW`.
    """

    def __init__(self, tensors: Mapping[str, Array], optimization: Optimization) -> None:
        self.tensors = tensors
        self.optimization = optimization
        self.steps = 0
        self.first = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
        self.second = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}

    def step(self, gradients: Mapping[str, Array], learning_rate: float) -> None:
        """Decay each matrix, then move each tensor against its averaged gradient; both averages start corrected."""
        beta1, beta2 = self.optimization.betas
        self.steps += 1
        for name, tensor in self.tensors.items():
            first, second, gradient = self.first[name], self.second[name], gradients[name]
            factor, decay = lr_ratio_and_decay(self.optimization, name, tensor.ndim)
            pace = learning_rate * factor
            tensor *= 1 - pace * decay
            first += (1 - beta1) * (gradient - first)
            second += (1 - beta2) * (gradient * gradient - second)
            spread = np.sqrt(second / (1 - beta2**self.steps)) + self.optimization.epsilon
            tensor -= pace / (1 - beta1**self.steps) * first / spread


def clip(gradients: Iterable[Array], limit: float) -> float:
    """Scale all gradients together, in place, so that their L2 norm is at most `limit`; returns the norm before.

    Source: `torch.nn.utils.clip_grad_norm_`, with its 1e-6.
    """
    gradients = list(gradients)
    norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients))
    factor = min(1.0, limit / (norm + 1e-6))
    for gradient in gradients:
        gradient *= factor
    return norm
