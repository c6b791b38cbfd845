"""Tiny random Llamas of awkward shapes for the reference backend, and rows for them."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.backends import open_backend
from finetune.backends.reference.model import ReferencePass
from finetune.objectives.cross_entropy import CROSS_ENTROPY
from finetune.ports import Objective
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization
from finetune_strategies.scratch import empty_folder
from support import sessions
from support.sessions import CONFIGS, VOCAB

CONFIG: dict[str, Any] = {
    **CONFIGS["llama"],
    "vocab_size": VOCAB,
    "hidden_size": 11,
    "intermediate_size": 13,
    "max_position_embeddings": 24,
    "initializer_range": 0.4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "pad_token_id": 0,
}
"""As awkward as the other backends' Llama, and smaller."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET = AdapterTarget(3, 7.0, 0.0, ("q_proj", "v_proj", "down_proj"))
DROPPING = AdapterTarget(2, 5.0, 0.4, LINEAR)


def open_model(folder: Path, *, dtype: str = "float32", pad_id: int = 0) -> Any:
    """The model in a folder."""
    return open_backend("reference").open(ModelLocation("tiny", folder, "local"), dtype, pad_id)


@cache
def _files(config: str) -> dict[str, bytes]:
    """The files of a new model."""
    with empty_folder() as folder:
        open_backend("reference").create(json.loads(config), folder, 5)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny(config: dict[str, Any] = CONFIG, *, pad_id: int = 0) -> Any:
    """A model none of whose weights is round: the gains of its norms are not one, nor its values those of float32."""
    with empty_folder() as folder:
        for name, content in _files(json.dumps(config)).items():
            (folder / name).write_bytes(content)
        session = open_model(folder, pad_id=pad_id)
    dice = np.random.default_rng(1)
    for weight in session.weights.values():
        weight += dice.normal(0, 0.1, weight.shape)
    return session


def adapted(target: AdapterTarget | None = TARGET, *, seed: int = 0, trained: bool = False, **how: Any) -> Any:
    """A model with an adapter, ready to be trained; `trained`: its B is not zero."""
    session = tiny(**how)
    session.attach(target, seed)
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    if trained:
        dice = np.random.default_rng(2)
        for tensor in session.trainable.values():
            tensor += dice.normal(0, 0.3, tensor.shape)
    return session


make_rows = partial(sessions.make_rows, longest=17)
ROWS = make_rows(7)
BATCH = Batch(ROWS)


def step(session: Any, number: int = 0) -> float:
    """One step of training."""
    loss = session.accumulate(Batch(make_rows(4, seed=number)), 0.1)
    session.clip_gradients()
    session.update(0.03)
    return float(loss)


def gradients(session: Any, *batches: Batch, objective: Objective = CROSS_ENTROPY) -> tuple[float, dict[str, Any]]:
    """The loss and every gradient of the batches, accumulated."""
    session.gradients = {}
    loss = sum(session.accumulate(batch, 0.3, objective) for batch in batches)
    return loss, dict(session.gradients)


def check_slopes(session: Any, batch: Batch, objective: Objective = CROSS_ENTROPY) -> None:
    """Every tensor's gradient, along a random direction, is the central difference of the loss, dropout replayed."""
    dice = np.random.default_rng(3)
    drawn = session._random.bit_generator.state
    _, found = gradients(session, batch, objective=objective)

    def loss() -> float:
        session._random.bit_generator.state = drawn
        forward = ReferencePass(session.shape, session._weights_now(), session.adapter, random=session._random)
        return float(session._loss(forward, batch, objective)[0])

    assert found.keys() == session.trainable.keys()
    for name, tensor in session.trainable.items():
        direction = dice.normal(size=tensor.shape)
        direction *= 3e-6 / np.linalg.norm(direction)
        tensor += direction
        above = loss()
        tensor -= 2 * direction
        below = loss()
        tensor += direction
        slope, claimed = 0.3 * (above - below) / 6e-6, float((found[name] * direction).sum()) / 3e-6
        assert abs(slope - claimed) <= 1e-6 * np.linalg.norm(found[name]) + 1e-8, name
