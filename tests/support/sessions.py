"""Tiny models of awkward shapes in every backend: sessions on them, and their numbers in NumPy, in float64."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.backends import open_backend
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow

VOCAB = 97
CONTEXT = 40
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
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
    # Five heads, weights stored the other way round, tied embeddings, and dropout of its own unless NO_DROPOUT.
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
WHOLE = {
    "llama": ("model.norm", "model.layers.0.mlp.up_proj"),
    "gpt2": ("transformer.ln_f", "transformer.h.0.mlp.c_fc"),
}
"""Modules to train whole: gains, and a matrix, which GPT-2 stores the other way round."""
BENCHES = ("torch-llama", "torch-gpt2", "mlx-llama", "mlx-gpt2", "reference-llama")
FRAMEWORKS = BENCHES[:4]
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5], [10], [11, 12, 13, 14, 15, 16, 17], [9, 8]]
USUAL = Optimization(weight_decay=0.05, max_grad_norm=1.0)
_NEEDED = {"reference": (), "torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx_lm")}


def need(*backends: str) -> None:
    """Skip the test, or the file that asks, where a backend's libraries are not installed."""
    for backend in backends:
        if any(find_spec(name) is None for name in _NEEDED[backend]):
            reason = f"needs the {backend} extra: pip install 'finetune-suite[{backend}]'"
            pytest.skip(reason, allow_module_level=True)


@dataclass(frozen=True)
class Bench:
    """A tiny model and the backend that it is opened in; the model's name is its kind."""

    backend: str
    location: ModelLocation

    @property
    def kind(self) -> str:
        """Llama or GPT-2."""
        return self.location.name

    def at(self, folder: Path, backend: str = "") -> "Bench":
        """The same for a model of this kind in another folder, or in another backend."""
        need(backend or self.backend)
        return Bench(backend or self.backend, ModelLocation(self.kind, folder, "local"))

    def open(self, *, dtype: str = "float32", pad_id: int = 0, **opening: Any) -> Any:
        """The model as it is, on the processor unless a test is about another device."""
        device = {"device": "cpu"} if self.backend == "torch" else {}
        return open_backend(self.backend).open(self.location, dtype, pad_id, **{**device, **opening})

    def target(self, **changes: Any) -> AdapterTarget:
        """An adapter whose scale is neither one nor whole."""
        return replace(AdapterTarget(3, 7.0, 0.0, MODULES[self.kind]), **changes)

    def kinds(self, dropout: float = 0.0) -> dict[str, AdapterTarget | None]:
        """One adapter of each kind, and none, where every weight is trained."""
        first = MODULES[self.kind][0]
        patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {".*": 5.0}}
        return {
            "lora": self.target(dropout=dropout, scaling="rank_stabilized", **patterns),
            "dora": self.target(dropout=dropout, kind="dora"),
            "ia3": self.target(rank=1, alpha=1.0, kind="ia3"),
            "saved": self.target(dropout=dropout, kind="dora", saved=WHOLE[self.kind]),
            "full": None,
        }

    def adapted(
        self,
        target: AdapterTarget | str | None = "usual",
        *,
        seed: int = 0,
        optimization: Optimization = USUAL,
        **opening: Any,
    ) -> Any:
        """A session with a fresh adapter, or with every weight free where there is none, ready to be trained."""
        session = self.open(**opening)
        session.attach(self.target() if isinstance(target, str) else target, seed)
        session.prepare_updates(optimization)
        return session

    def trained(self, target: AdapterTarget | str | None = "usual", **how: Any) -> Any:
        """A session that has gone a few steps."""
        session = self.adapted(target, **how)
        train_a_little(session)
        return session


def make_model(bench: str, folder: Path, **changes: Any) -> Bench:
    """A model of random weights in `folder`, made by the backend and of the kind that `bench` names ("torch-llama")."""
    backend, kind = bench.split("-")
    need(backend)
    folder.mkdir(parents=True, exist_ok=True)
    open_backend(backend).create({**IDS, **CONFIGS[kind], **changes}, folder, 5)
    return Bench(backend, ModelLocation(kind, folder, "local"))


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


def step(session: Any, batches: Sequence[Batch], rate: float = 0.02) -> float:
    """One optimizer step on these batches together; returns its mean loss."""
    targets = sum(batch.target_count for batch in batches)
    total = sum(session.accumulate(batch, 1 / targets) for batch in batches)
    session.clip_gradients()
    session.update(rate)
    return float(total / targets)


def train_a_little(session: Any, steps: int = 3) -> None:
    """A few steps, so that the adapter is not nothing."""
    for number in range(steps):
        step(session, batches_of(make_rows(5, seed=number), 2), 0.05)


def adapter_bytes(session: Any, folder: Path) -> bytes:
    """The adapter file as it would be saved."""
    folder.mkdir(parents=True)
    session.save_adapter(folder)
    return (folder / "adapter_model.safetensors").read_bytes()


def backend_of(session: Any) -> str:
    """The backend whose session it is."""
    return type(session).__module__.split(".")[2]


def weights(session: Any) -> dict[str, Any]:
    """A copy of every trainable tensor."""
    if backend_of(session) == "reference":
        return {name: tensor.copy() for name, tensor in session.trainable.items()}
    return {name: _numbers(tensor) for name, tensor in session._trainable().items()}


def gradients(session: Any) -> dict[str, Any]:
    """A copy of every gradient there is."""
    if backend_of(session) == "torch":
        named = session._trainable().items()
        return {name: _numbers(tensor.grad) for name, tensor in named if tensor.grad is not None}
    return {name: _numbers(gradient) for name, gradient in session.gradients.items()}


def put(session: Any, values: Mapping[str, Any]) -> None:
    """Give trainable tensors these values, in float32 but for the reference."""
    if backend_of(session) == "reference":
        for name, value in values.items():
            session.trainable[name][...] = value
        return
    rounded = {name: np.asarray(value, np.float32) for name, value in values.items()}
    if backend_of(session) == "mlx":
        import mlx.core as mx

        session._put({name: mx.array(value) for name, value in rounded.items()})
        return
    for name, value in rounded.items():
        session._trainable()[name].data.copy_(_torch().from_numpy(value))


def shake(session: Any, spread: float = 0.1) -> None:
    """Move every trainable tensor, so that no B is zero."""
    dice = np.random.default_rng(4)
    put(session, {name: value + dice.normal(0, spread, value.shape) for name, value in weights(session).items()})


def accumulated(session: Any, *batches: Batch, weight: float = 0.1) -> tuple[float, dict[str, Any]]:
    """The loss and every gradient of the batches, from nothing."""
    clear_gradients(session)
    loss = sum(session.accumulate(batch, weight) for batch in batches)
    found = gradients(session)
    clear_gradients(session)
    return loss, found


def clear_gradients(session: Any) -> None:
    """Let a session forget what it has accumulated."""
    if backend_of(session) == "torch":
        session.model.zero_grad(set_to_none=True)
    else:
        session.gradients = {}


def logits(session: Any, prompt: Sequence[int]) -> Any:
    """The logits after each token, as exact as the backend has them."""
    if backend_of(session) == "reference":
        return session.logits(prompt)
    if backend_of(session) == "mlx":
        return _numbers(session.forward_pass.logits(prompt))
    session.model.eval()
    with _torch().no_grad():
        return _numbers(session.model(input_ids=_torch().tensor([list(prompt)])).logits[0])


def all_logits(session: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> Any:
    """The logits on all prompts, one after the other."""
    return np.concatenate([logits(session, prompt) for prompt in prompts])


def random_state(session: Any) -> Any:
    """Every random state that a session could disturb."""
    if backend_of(session) == "reference":
        return session._random.bit_generator.state
    if backend_of(session) == "torch":
        return _torch().get_rng_state().tolist()
    import mlx.core as mx

    return np.array(session._key).tolist(), np.array(mx.random.state[0]).tolist()


def modes(session: Any) -> dict[str, bool]:
    """Which of torch's modules are training; nothing in other backends."""
    named = session.model.named_modules() if backend_of(session) == "torch" else ()
    return {name: module.training for name, module in named}


def dtypes(session: Any) -> dict[str, set[str]]:
    """The dtypes of what is trained, of its gradients and moments, and of all the rest."""
    own, optimizer = session._trainable(), session.optimizer
    if backend_of(session) == "torch":
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        slopes = [tensor.grad for tensor in own.values() if tensor.grad is not None]
        rest = [tensor for name, tensor in session.model.named_parameters() if name not in own]
    else:
        moments, slopes = [*optimizer.first.values(), *optimizer.second.values()], list(session.gradients.values())
        rest = [tensor for place, tensor in session._tensors().items() if place not in set(session._trained.values())]
    parts = {"trained": own.values(), "gradients": slopes, "moments": moments, "rest": rest}
    return {part: {str(tensor.dtype).rpartition(".")[2] for tensor in tensors} for part, tensors in parts.items()}


def poison(session: Any, token: int, value: float) -> None:
    """Make the embedding of a word something that no computing can mend."""
    if backend_of(session) == "torch":
        session.model.get_input_embeddings().weight.data[token] = value
        return
    tensors = session.weights if backend_of(session) == "reference" else session._tensors()
    table = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    if backend_of(session) == "reference":
        tensors[table][token] = value
        return
    import mlx.core as mx

    changed = np.array(tensors[table])
    changed[token] = value
    session.loaded.model.load_weights([(table, mx.array(changed))], strict=False)


def break_forward(session: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every computation of a loss end in this error."""

    def fail(*given: Any, **named: Any) -> Any:
        raise error

    if backend_of(session) == "torch":
        monkeypatch.setattr(session, "_loss", fail)
    else:
        monkeypatch.setattr(type(session.forward_pass), "loss", fail)


def _numbers(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        return np.array(tensor.detach().double().numpy())
    if type(tensor).__module__.startswith("mlx"):
        import mlx.core as mx

        tensor = tensor.astype(mx.float32)
    return np.array(tensor).astype(np.float64)


def _torch() -> Any:
    import torch

    return torch


def in_full(bench: Bench, folder: Path, **opening: Any) -> Bench:
    """The full model that a quantised one stands for."""
    folder.mkdir()
    bench.open(**opening).save_model(folder)
    return bench.at(folder)


def of_base(session: Any) -> dict[str, str]:
    """The hashes of all that is not trained."""
    names = session.trainable_names()
    return {name: mark for name, mark in session.fingerprints().items() if name not in names}
