"""Shares a model's frozen weights among processes while it trains: torch's own FSDP2, block by block."""

from typing import Any

import torch.distributed as dist

from finetune.errors import RefusedError


def shard(model: Any) -> None:
    """Keep only this process's part of each block's frozen weights; a block's others are fetched while it computes.

    Adapters stay whole everywhere, and so do the embedding and the head, which are no blocks.

    Raises:
        RefusedError: the model does not say what its blocks are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = {tensor for tensor in model.parameters() if tensor.requires_grad}
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=trained)


def unshard(model: Any) -> None:
    """Have every weight in this process again: from now on it computes without the others."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False)  # noqa: FBT003  # torch takes it by position
            module.set_reshard_after_backward(False)  # noqa: FBT003
            module.unshard()


def _blocks(model: Any) -> list[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        raise RefusedError(
            f"FSDP needs to know the blocks of a model, and {type(base).__name__} does not say what they are",
            hint="use distributed_type MULTI_GPU: every process then holds all weights",
        )
    return blocks
