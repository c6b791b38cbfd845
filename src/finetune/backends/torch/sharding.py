"""Shares a model's frozen weights among processes while it trains: torch's own FSDP2, block by block."""

from typing import Any

import torch
import torch.distributed as dist

from finetune.backends.torch.load import load_model
from finetune.backends.torch.packed import is_packed
from finetune.backends.torch.state import quiet_wrapping
from finetune.errors import RefusedError
from finetune.records import ModelLocation


def shard(model: Any) -> None:
    """Keep only this process's part of each block's frozen weights; a block's others are fetched while it computes.

    Adapters stay whole everywhere, and so do the embedding and the head, which are no blocks.

    Raises:
        RefusedError: the model does not say what its blocks are, or is quantised.
    """
    if is_packed(model):
        raise RefusedError(
            "FSDP shares out full weights, and this base is quantised",
            hint="use distributed_type MULTI_GPU, or leave out model.quantize",
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = {tensor for tensor in model.parameters() if tensor.requires_grad}
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=trained)


def whole_again(model: Any, location: ModelLocation) -> Any:
    """The same model with every weight in this process: the frozen ones from their files, the trained ones from here.

    torch can fetch a block's weights back, but shares them out anew whenever somebody saves; and only one process
    goes on, so that the others need not take part.
    """
    from peft import get_peft_model

    frozen = next(tensor for tensor in model.parameters() if not tensor.requires_grad)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with torch.random.fork_rng(), quiet_wrapping():
        whole = get_peft_model(
            load_model(location, str(frozen.dtype).removeprefix("torch.")), model.peft_config["default"]
        )
    with torch.no_grad():
        for name, tensor in whole.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(trained.pop(name))
    assert not trained
    return whole.eval()


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
