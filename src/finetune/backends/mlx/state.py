"""Writes and restores what an MLX session is made of: trainable tensors, moments, step count, random state."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from finetune.backends.mlx.optimizer import MlxAdamW
from finetune.backends.mlx.tensors import read_tensors, write_tensors
from finetune.errors import ModelError, RefusedError

_TENSORS = "state.safetensors"


def save_state(weights: Mapping[str, mx.array], optimizer: MlxAdamW, key: mx.array, folder: Path) -> None:
    """Write every trainable tensor with its moments, the steps done and the random key."""
    write_tensors(_named(weights, optimizer, key), folder / _TENSORS)


def load_state(
    weights: Mapping[str, mx.array], optimizer: MlxAdamW, folder: Path
) -> tuple[dict[str, mx.array], mx.array]:
    """Restore the optimizer as it was saved; returns the trainable tensors and the random key.

    Nothing is changed unless every tensor is there with its shape and kind of number.

    Raises:
        RefusedError: the file is corrupt, or its tensors are not those of this model and adapter.
    """
    expected = _named(weights, optimizer, mx.random.key(0))
    try:
        saved = read_tensors(folder / _TENSORS, f"checkpoint {folder}")
    except ModelError as error:
        raise RefusedError(f"checkpoint {folder} cannot be read: {error.message}", hint="use an older one") from None
    wrong = expected.keys() ^ saved.keys()
    wrong |= {name for name in expected if name in saved and _form(expected[name]) != _form(saved[name])}
    if wrong:
        raise RefusedError(
            f"checkpoint {folder} does not fit this run: {len(wrong)} tensors differ, among them {min(wrong)}",
            hint="resume with the model and adapter settings that the run was started with",
        )
    optimizer.steps = int(saved["steps"].item())
    optimizer.first = {name: saved[f"exp_avg/{name}"] for name in weights}
    optimizer.second = {name: saved[f"exp_avg_sq/{name}"] for name in weights}
    return {name: saved[f"weight/{name}"] for name in weights}, saved["random"]


def _named(weights: Mapping[str, mx.array], optimizer: MlxAdamW, key: mx.array) -> dict[str, mx.array]:
    parts = {"weight": weights, "exp_avg": optimizer.first, "exp_avg_sq": optimizer.second}
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    return tensors | {"random": key, "steps": mx.array(optimizer.steps, mx.uint32)}


def _form(tensor: mx.array) -> tuple[tuple[int, ...], str]:
    return tensor.shape, str(tensor.dtype)
