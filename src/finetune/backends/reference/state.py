"""Writes and restores what a reference session is made of: trainable tensors, moments, step count, random state."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.backends.reference.optimizer import ReferenceAdamW
from finetune.backends.reference.weights import read_tensors
from finetune.errors import ModelError, RefusedError
from finetune.reading import read_json

Array = NDArray[np.float64]
_TENSORS, _REST = "state.safetensors", "state.json"


def save_state(optimizer: ReferenceAdamW, random: np.random.Generator, folder: Path) -> None:
    """Write every trainable tensor with its moments in float64, and the steps done and random state as JSON."""
    save_file(_named(optimizer), folder / _TENSORS)
    rest = {"steps": optimizer.steps, "random": random.bit_generator.state}
    (folder / _REST).write_text(json.dumps(rest, indent=1) + "\n", encoding="utf-8")


def load_state(optimizer: ReferenceAdamW, random: np.random.Generator, folder: Path) -> None:
    """Restore what `save_state` wrote; nothing is changed unless every tensor is there with its shape.

    Raises:
        RefusedError: a file is corrupt, or the tensors are not those of this model and adapter.
    """
    named = _named(optimizer)
    try:
        saved = read_tensors(folder / _TENSORS, f"checkpoint {folder}")
        rest = read_json(folder / _REST)
        steps = int(rest["steps"])
        np.random.PCG64().state = rest["random"]  # tried on another one first
    except (ModelError, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise RefusedError(f"checkpoint {folder} cannot be read: {error}", hint="use an older checkpoint") from None
    wrong = named.keys() ^ saved.keys()
    wrong |= {name for name in named if name in saved and named[name].shape != saved[name].shape}
    if wrong:
        raise RefusedError(
            f"checkpoint {folder} does not fit this run: {len(wrong)} tensors differ, among them {min(wrong)}",
            hint="resume with the model and adapter settings that the run was started with",
        )
    for name, tensor in named.items():
        tensor[...] = saved[name]
    optimizer.steps = steps
    random.bit_generator.state = rest["random"]


def _named(optimizer: ReferenceAdamW) -> dict[str, Array]:
    parts: Mapping[str, Mapping[str, Array]] = {
        "weight": optimizer.tensors,
        "exp_avg": optimizer.first,
        "exp_avg_sq": optimizer.second,
    }
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
