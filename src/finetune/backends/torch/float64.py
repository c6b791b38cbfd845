"""Computes a model in float64 from the weights that it has, one tensor widened at a time."""

from itertools import pairwise
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
        if func is torch.ops.aten._grouped_mm.default:  # experts at once, which torch computes in no float64
            return _grouped(*args, **(kwargs or {}))
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _grouped(rows: Any, experts: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows (n, inputs) through experts (experts, inputs, outputs): those up to `offs[k]` that none had through k."""
    assert rows.dim() == 2 and experts.dim() == 3 and bias is None  # noqa: PT018  # all that transformers asks for
    ends = offs.tolist()
    parts = [rows[begin:end].double() @ experts[k].double() for k, (begin, end) in enumerate(pairwise([0, *ends]))]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], experts.shape[2], dtype=torch.float64)])


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
