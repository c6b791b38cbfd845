"""One model and one adapter in every backend that computes it, and what is compared between them.

Whoever imports this is skipped where torch or MLX is missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.backends import open_backend
from finetune.records import Batch, ModelLocation
from finetune_strategies.adapters import AdaptedModel, varied_models
from finetune_strategies.models import gpt2_configs, llama_configs
from support.sessions import NO_DROPOUT, need, put, weights

need("torch", "mlx")
LLAMAS = varied_models(llama_configs(vocab_size=97), dropouts=(0.0,))
GPT2S = varied_models(
    # What mlx-lm computes: no dropout of its own, a tied head only, an inner size of four times the width only.
    gpt2_configs(vocab_size=97).map(
        lambda config: {**config, **NO_DROPOUT, "tie_word_embeddings": True, "n_inner": None}
    ),
    dropouts=(0.0,),
)


def write_model(model: AdaptedModel, folder: Path) -> ModelLocation:
    """The model's files in an empty folder, none of its numbers round."""
    open_backend(backends_of(model)[0]).create(model.config, folder, 3)
    dice = np.random.default_rng(9)
    tensors = load_file(folder / "model.safetensors")
    # A new model's biases are zero and its gains one: nobody could tell what became of them.
    odd = {
        name: value + dice.normal(0, 0.2, value.shape).astype("f4") if value.ndim == 1 else value
        for name, value in tensors.items()
    }
    save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelLocation("tiny", folder, "local")


def backends_of(model: AdaptedModel) -> list[str]:
    """The backends that compute it; the first is the one that the others are measured by."""
    return ["reference", "torch", "mlx"] if model.config["model_type"] == "llama" else ["torch", "mlx"]


def open_bare(model: AdaptedModel, location: ModelLocation, pad_id: int = 0) -> dict[str, Any]:
    """The model in every backend that computes it, without an adapter."""
    return {name: open_backend(name).open(location, "float32", pad_id) for name in backends_of(model)}


def open_all(model: AdaptedModel, location: ModelLocation, pad_id: int = 0) -> dict[str, Any]:
    """The model in every backend that computes it, with one adapter on all of them, freshly drawn."""
    sessions = open_bare(model, location, pad_id)
    for session in sessions.values():
        session.attach(model.target, 1)
    spread(sessions, weights(sessions["torch"]))
    return sessions


def in_float64(model: AdaptedModel, location: ModelLocation) -> Any:
    """The model with its adapter in torch, computed in float64: what others are measured by where no reference is."""
    session: Any = open_backend("torch").open(location, "float32", 0)
    session.attach(model.target, 1)
    session.model.double()
    return session


def spread(sessions: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Give the trainable tensors of all sessions these values, rounded to float32."""
    rounded = {name: np.asarray(value, np.float32) for name, value in values.items()}
    for session in sessions.values():
        put(session, rounded)


def shaken(sessions: Mapping[str, Any]) -> None:
    """Move every trainable tensor alike, so that no B is zero and no magnitude a length of the base's."""
    dice = np.random.default_rng(4)
    held = weights(sessions["torch"])
    spread(sessions, {name: value + dice.normal(0, 0.1, value.shape) for name, value in held.items()})


def training_events(session: Any) -> int:
    """How many steps the optimizer says it has taken."""
    if hasattr(session.optimizer, "steps"):
        return int(session.optimizer.steps)
    counts = {int(state["step"]) for state in session.optimizer.state.values()}
    assert len(counts) <= 1
    return max(counts, default=0)


def labels(batch: Batch) -> list[tuple[int, int]]:
    """Where a token is predicted, counted through the padded batch, and which token it must be, as backends take it."""
    arrays = batch.arrays(0)
    return list(zip(np.flatnonzero(arrays.here).tolist(), arrays.targets.tolist(), strict=True))


def labels_by_hand(batch: Batch) -> list[tuple[int, int]]:
    """The same, read off the rows: each trained token of a row but its first is predicted at the token before it."""
    length = max(sum(len(row.ids) for row in sequence) for sequence in batch.sequences)
    found = []
    for number, sequence in enumerate(batch.sequences):
        start = number * length
        for row in sequence:
            found += [(start + at - 1, row.ids[at]) for at in range(1, len(row.ids)) if row.trained[at]]
            start += len(row.ids)
    return found
