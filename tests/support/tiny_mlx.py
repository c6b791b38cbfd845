"""Tiny random models for the MLX backend and sessions on them; whoever imports this is skipped where MLX is missing."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("mlx") is None or find_spec("mlx_lm") is None:
    pytest.skip("needs the mlx extra: pip install 'finetune-suite[mlx]'", allow_module_level=True)

# Before anybody imports MLX itself: this is what makes it fast on Linux.
from finetune.backends import open_backend
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, Quantization
from support.tiny_models import CONFIGS, VOCAB, target_of

BACKEND: Any = open_backend("mlx")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_model(kind: str, folder: Path, **changes: Any) -> ModelLocation:
    """A model of random weights in `folder`, made by MLX."""
    folder.mkdir(parents=True, exist_ok=True)
    BACKEND.create({**IDS, **CONFIGS[kind], **changes}, folder, 5)
    return ModelLocation(kind, folder, "local")


def open_session(
    location: ModelLocation, *, dtype: str = "float32", pad_id: int = 0, quantize: Quantization | None = None
) -> Any:
    """The model as it is, or quantised."""
    return BACKEND.open(location, dtype, pad_id, quantize=quantize)


def adapted(
    location: ModelLocation, *, seed: int = 0, dropout: float = 0.0, target: AdapterTarget | None = None, **opening: Any
) -> Any:
    """A session with a fresh adapter, ready to be trained."""
    session = open_session(location, **opening)
    session.attach(target or target_of(location.name, dropout=dropout), seed)
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    return session


def gradients(session: Any) -> dict[str, Any]:
    """A copy of every gradient there is, in float64."""
    return {name: np.array(value).astype(np.float64) for name, value in session.gradients.items()}


def accumulated(session: Any, *batches: Batch) -> tuple[float, dict[str, Any]]:
    """The loss and every gradient of the batches, from nothing."""
    session.gradients = {}
    loss = sum(session.accumulate(batch, 0.1) for batch in batches)
    found = gradients(session)
    session.gradients = {}
    return loss, found


def weights(session: Any) -> dict[str, Any]:
    """A copy of every trainable tensor, in float64."""
    return {name: np.array(value).astype(np.float64) for name, value in session._trainable().items()}


def set_weights(session: Any, values: dict[str, Any]) -> None:
    """Give trainable tensors these values."""
    session._put({name: mx.array(np.asarray(value, np.float32)) for name, value in values.items()})


def shake(session: Any, spread: float = 0.1) -> None:
    """Move every trainable tensor, so that no B is zero."""
    dice = np.random.default_rng(4)
    held = weights(session)
    set_weights(session, {name: value + dice.normal(0, spread, value.shape) for name, value in held.items()})


def close(first: dict[str, Any], second: dict[str, Any], tolerance: float = 1e-4) -> bool:
    """Whether two sets of tensors have the same names and differ by a small share of the largest value of each."""
    return first.keys() == second.keys() and all(
        np.abs(first[name] - second[name]).max() <= tolerance * np.abs(first[name]).max() + 1e-7 for name in first
    )


def logits_of(session: Any, prompts: Any) -> list[Any]:
    """The session's logits on the prompts."""
    return [np.array(session.forward_pass.logits(ids)) for ids in prompts]


def furthest(first: list[Any], second: list[Any]) -> float:
    """The largest difference of logits."""
    return max(float(np.abs(one - other).max()) for one, other in zip(first, second, strict=True))


def equal(first: list[Any], second: list[Any]) -> bool:
    """Whether all logits are equal to the bit."""
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
