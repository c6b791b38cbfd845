"""Computes a model in float64 from the weights that it has, one tensor widened at a time."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Float64(TorchDispatchMode):  # type: ignore[misc]
    """Within this context every operation on floats is computed in float64, whatever precision its code asks for.

    Weights stay as they are: each is widened where it is read, and let go. Norms and rotations, for which
    transformers asks for float32 by name, are computed in float64, too; `model.double()` leaves them in float32.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of ATen, its floats and the types it is asked for widened."""
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
