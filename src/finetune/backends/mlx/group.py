"""The processes that mlx.launch has started, in a ring: they add up numbers and gradients."""

import os
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from finetune.distributed.data_parallel import SingleProcess
from finetune.distributed.environment import refuse_launched, started_by
from finetune.errors import LostProcessError, RefusedError, TrainingError
from finetune.ports import Group, Session


class MlxGroup:
    """Processes joined by mx.distributed; implements `ports.Group`."""

    in_step = False

    def __init__(self, group: mx.distributed.Group) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group = group

    def total(self, value: float) -> float:
        """The sum of one number over all processes, in double precision, which no GPU has: so their bytes are told."""
        own = mx.array(np.frombuffer(np.float64(value).tobytes(), dtype=np.uint32))
        told = np.array(self._done(mx.distributed.all_gather(own, group=self._group)))
        return float(sum(told.view(np.float64).tolist()))

    def sum(self, tensor: mx.array) -> mx.array:
        """The sum of a tensor over all processes."""
        return self._done(mx.distributed.all_sum(tensor, group=self._group))

    def divide(self, session: Session) -> None:
        """Every process holds all weights: MLX shares none."""

    def restore(self, session: Session) -> None:
        """Nothing was given away."""

    def _done(self, tensor: mx.array) -> mx.array:
        try:
            mx.eval(tensor)
        except RuntimeError as error:
            raise LostProcessError(
                f"rank {self.rank} has lost another process of this run: {str(error).splitlines()[0]}",
                hint="what ended the other one is told above",
            ) from None
        return tensor


def join_group() -> Group:
    """The processes that mlx.launch has started together with this one; a group of one where none has.

    Raises:
        RefusedError: another launcher has started them, or this MLX cannot join processes.
        TrainingError: the processes do not find each other.
    """
    refuse_launched(os.environ, "mlx")
    if not started_by(os.environ):
        return SingleProcess()
    if not mx.distributed.is_available("ring"):
        raise RefusedError("this build of MLX cannot join processes in a ring", hint="install MLX from PyPI")
    try:
        return MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of this run do not find each other: {str(error).splitlines()[0]}") from None


def pool_gradients(trainable: Mapping[str, mx.array], own: Mapping[str, mx.array], group: Group) -> dict[str, mx.array]:
    """Every gradient's sum over all processes, in float32; a process without any takes part all the same."""
    flat = [own[name].reshape(-1) if own else mx.zeros(tensor.size) for name, tensor in trainable.items()]
    # One piece: one message, and the same rounding for every tensor.
    whole = group.sum(mx.concatenate(flat))
    ends = np.cumsum([tensor.size for tensor in trainable.values()]).tolist()
    parts = mx.split(whole, ends[:-1])
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(trainable.items(), parts, strict=True)}
