"""Tiny random models with awkward shapes, rows for them, and sessions on them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.ports import Session
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow

VOCAB = 97
CONTEXT = 40
CONFIGS: dict[str, dict[str, Any]] = {
    # Three heads of six share one key; 3 x 6 is not the hidden size; no two sides of a matrix are alike.
    "llama": {
        "model_type": "llama",
        "hidden_size": 21,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    },
    # Five heads, weights stored the other way round, tied embeddings, and dropout of its own.
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 20,
        "n_head": 5,
        "n_layer": 2,
        "n_positions": CONTEXT,
        "initializer_range": 0.3,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
}
MODULES = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_model(kind: str, folder: Path, **changes: Any) -> ModelLocation:
    """A model of random weights in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    open_backend("torch").create({**ids, **CONFIGS[kind], **changes}, folder, seed=5)
    return ModelLocation(kind, folder, "local")


def open_session(location: ModelLocation, *, dtype: str = "float32", pad_id: int = 0, device: str = "cpu") -> Any:
    """The model as it is, on the processor unless a law is about another device."""
    return open_backend("torch").open(location, dtype, pad_id, device=device)


def target_of(kind: str, *, rank: int = 3, dropout: float = 0.0) -> AdapterTarget:
    """An adapter whose scale is neither one nor whole."""
    return AdapterTarget(rank, 7.0, dropout, MODULES[kind])


def adapted(location: ModelLocation, *, seed: int = 0, dropout: float = 0.0, **opening: Any) -> Any:
    """A session with a fresh adapter, ready to be trained."""
    session = open_session(location, **opening)
    session.attach(target_of(location.name, dropout=dropout), seed)
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    return session


def make_rows(count: int, *, seed: int = 0, longest: int = 23) -> tuple[TokenizedRow, ...]:
    """Rows of very unequal lengths; the first has one trained token, some have trained and untrained ones mixed."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        length = (2, longest, 3, 11, 7)[number % 5]
        ids = tuple(dice.randrange(3, VOCAB) for _ in range(length))
        trained = [dice.random() < 0.6 for _ in range(length)]
        trained[-1] = True
        rows.append(TokenizedRow(ids, tuple(trained), f"row {number}"))
    return tuple(rows)


def batches_of(rows: Sequence[TokenizedRow], size: int) -> list[Batch]:
    """The rows in their order, so many at a time."""
    return [Batch(tuple(rows[start : start + size])) for start in range(0, len(rows), size)]


def step(session: Session, batches: Sequence[Batch], rate: float = 0.02) -> float:
    """One optimizer step on these batches together; returns its mean loss."""
    targets = sum(batch.target_count for batch in batches)
    total = sum(session.accumulate(batch, 1 / targets) for batch in batches)
    session.clip_gradients()
    session.update(rate)
    return total / targets


def train_a_little(session: Session, steps: int = 3) -> None:
    """A few steps, so that the adapter is not nothing."""
    for number in range(steps):
        step(session, batches_of(make_rows(5, seed=number), 2), 0.05)


def adapter_bytes(session: Session, folder: Path) -> bytes:
    """The adapter file as it would be saved."""
    folder.mkdir(parents=True)
    session.save_adapter(folder)
    return (folder / "adapter_model.safetensors").read_bytes()
