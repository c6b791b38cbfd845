"""Where torch computes, and the random numbers that are drawn there."""

import os
from collections.abc import Mapping

import torch

from finetune.distributed.environment import started_by
from finetune.errors import RefusedError

_CPU, _GPU = "random", "random/gpu"


def choose_device(wanted: str) -> torch.device:
    """The device meant by "cpu", "gpu" or "auto", which is the GPU where there is one for this run alone.

    Raises:
        RefusedError: a GPU is asked for where torch sees none, or where several processes train.
    """
    together = started_by(os.environ)
    if wanted == "gpu" and together:
        raise RefusedError(
            f"model.device is gpu, but {together} has started several processes, which train on the processor here",
            hint="use one process, or set model.device to cpu",
        )
    seen = torch.cuda.is_available()
    if wanted == "gpu" and not seen:
        raise RefusedError(
            f"model.device is gpu, but torch {torch.__version__} sees no CUDA device on this machine",
            hint="set model.device to cpu, or install a torch that was built for this machine's GPU",
        )
    taken = seen and wanted != "cpu" and not together
    return torch.device("cuda", torch.cuda.current_device()) if taken else torch.device("cpu")


def is_exhausted(error: Exception) -> bool:
    """Whether an error of torch's, or of Python's, says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def name_device(device: torch.device) -> str:
    """What a run writes down: "cpu", or the GPU by its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The random states that training on this device draws from, by name."""
    state = {_CPU: torch.get_rng_state()}
    return state | {_GPU: torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Draw on from a state of `random_state`."""
    torch.set_rng_state(state[_CPU])
    if _GPU in state:
        torch.cuda.set_rng_state(state[_GPU], device)
