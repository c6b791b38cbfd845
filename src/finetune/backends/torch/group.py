"""The processes that torchrun or accelerate has started, over gloo: they add up numbers and gradients."""

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune.backends.torch.sharding import shard, whole_again
from finetune.distributed.data_parallel import SingleProcess
from finetune.distributed.environment import refuse_launched
from finetune.errors import LostProcessError, RefusedError, TrainingError
from finetune.ports import Group

_PATIENCE = timedelta(days=7)
"""How long a process waits for others, which may be asking the model questions; one that died is seen at once."""
_NOT_OURS = {
    "ACCELERATE_MIXED_PRECISION": ("mixed precision", ("no",), "set model.dtype instead"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient accumulation",
        ("1",),
        "set training.gradient_accumulation_steps instead",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile", ("no",), "leave it out"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", ("false",), "use MULTI_GPU or FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", ("false",), "use MULTI_GPU or FSDP"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("other kinds of parallelism", ("false",), "use MULTI_GPU or FSDP"),
    "FSDP_OFFLOAD_PARAMS": ("offloading to the processor", ("false",), "training runs on it already"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "its own checkpointing",
        ("false",),
        "set training.gradient_checkpointing instead",
    ),
}
"""What accelerate can ask of a process by its environment and this backend does not do: refused, never ignored."""


class TorchGroup:
    """Processes joined by torch.distributed; implements `ports.Group`."""

    def __init__(self, *, sharded: bool) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.in_step = False
        self._sharded = sharded

    def total(self, value: float) -> float:
        """The sum of one number over all processes, in double precision."""
        return float(self.sum(torch.tensor([value], dtype=torch.float64)))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in place."""
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise as_lost(error) from None
        return tensor

    def divide(self, session: Any) -> None:
        """With FSDP: keep only this process's part of the frozen weights, until `restore`."""
        if self._sharded:
            shard(session.model)
            self.in_step = True

    def restore(self, session: Any) -> None:
        """Have all weights in the first process again, which goes on alone."""
        if self._sharded:
            self.in_step = False
            if self.rank == 0:
                session.model = whole_again(session.model, session.location)


def join_group() -> Group:
    """The processes that a launcher has started together with this one; a group of one where none has.

    Raises:
        RefusedError: the launcher asks for something that is not done here.
        TrainingError: the processes do not find each other.
    """
    refuse_launched(os.environ, "torch")
    _refuse_wishes(os.environ)
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return SingleProcess()
    # transformers would load weights into the first process only, which leaves the others with none.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of this run do not find each other: {str(error).splitlines()[0]}") from None
    return TorchGroup(sharded=os.environ.get("ACCELERATE_USE_FSDP") == "true")


def _refuse_wishes(environ: Mapping[str, str]) -> None:
    for name, (what, fine, hint) in _NOT_OURS.items():
        if (asked := environ.get(name)) is not None and asked.lower() not in fine:
            raise RefusedError(f"accelerate asks for {what} ({name}={asked}), which is not done here", hint=hint)


def as_lost(error: Exception) -> Exception:
    """The error as what it is: with FSDP any pass through the model can find that another process has ended."""
    if not (isinstance(error, RuntimeError) and "gloo" in str(error) and dist.is_initialized()):
        return error
    return LostProcessError(
        f"rank {dist.get_rank()} has lost another process of this run: {str(error).splitlines()[0]}",
        hint="what ended the other one is told above",
    )


def pool_gradients(trainable: Iterable[torch.nn.Parameter], group: Group) -> None:
    """Replace every gradient by its sum over all processes; one that no process has stays without."""
    tensors = list(trainable)
    own = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    found = torch.tensor([float(tensor.grad is not None) for tensor in tensors])
    # One piece: one message, and the same rounding for every tensor.
    whole = group.sum(torch.cat([*(gradient.reshape(-1) for gradient in own), found]))
    *parts, found = whole.split([*(tensor.numel() for tensor in tensors), len(tensors)])
    for tensor, part, count in zip(tensors, parts, found.tolist(), strict=True):
        tensor.grad = part.view_as(tensor).to(tensor.dtype) if count else None
