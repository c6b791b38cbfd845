"""Backends held against each other: one model and one adapter compute, train and save the same in each.

transformers computes some parts of a Llama in float32 whatever the model's dtype. Where ten digits are compared its
own code runs here with those parts widened to float64; nothing of it is written anew.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given

from support.sessions import (
    CONFIGS,
    IDS,
    NO_DROPOUT,
    USUAL,
    backend_of,
    batches_of,
    gradients,
    logits,
    make_model,
    make_rows,
    need,
    put,
    shake,
    weights,
)

need("torch")
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from finetune.adapters.choose import choose_layers  # noqa: E402
from finetune.backends import open_backend  # noqa: E402
from finetune.data.batches import shared_start  # noqa: E402
from finetune.models.locate import locate_model  # noqa: E402
from finetune.models.shape import read_shape  # noqa: E402
from finetune.records import AdapterTarget, Batch, ModelLocation, TokenizedRow  # noqa: E402
from finetune_strategies.adapters import AdaptedModel, adapted_layers, adapted_models  # noqa: E402
from finetune_strategies.datasets import token_rows  # noqa: E402
from finetune_strategies.models import model_configs  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402
from support.side_by_side import GPT2S, LLAMAS, in_float64, open_all, open_bare, shaken, write_model  # noqa: E402
from support.tolerances import apart, check_gradients  # noqa: E402

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
PROMPT = list(ROWS[1].ids)
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1, "hidden_size": 27, "head_dim": 10},
    "all heads": {"num_key_value_heads": 3, "rms_norm_eps": 1e-2, "intermediate_size": 5},
    "five on one": {"num_attention_heads": 5, "hidden_size": 15, "head_dim": 2, "rope_theta": 30.0},
    "six on two": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": None},
}


@contextmanager
def widened() -> Iterator[None]:
    """Let transformers compute what it computes in float32 in float64."""

    class Wide(ModuleType):
        float = float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    wide = patch.object(modeling_llama, "torch", Wide("torch"))
    with wide, patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def open_in(backend: str, location: ModelLocation) -> Any:
    """The model in a backend; "torch64" is torch in float64."""
    session: Any = open_backend(backend.removesuffix("64")).open(location, "float32", 0)
    if backend == "torch64":
        session.model.double()
    return session


def attach_both(exact: Any, other: Any, *, trained: bool = True) -> None:
    """One adapter on every linear layer of both, its scale neither one nor whole, its B zero or not."""
    target = AdapterTarget(3, 7.0, 0.0, choose_layers(read_shape(exact.location.folder), "all-linear"))
    for seed, session in enumerate((exact, other)):
        session.attach(target, seed)
        if backend_of(session) == "torch":
            session.model.to(next(session.model.parameters()).dtype)
    if trained:
        shake(exact)
    values = {name: value.astype(np.float32) for name, value in weights(exact).items()}
    for session in (exact, other):
        put(session, values)


def check_pair(exact: Any, other: Any, *, full: bool, tolerance: float) -> None:
    """Logits with and without an adapter, losses of padded batches and every gradient are the same."""

    def check_logits() -> None:
        assert all(apart(logits(other, row.ids), logits(exact, row.ids)) < tolerance for row in ROWS)

    check_logits()
    if full:
        exact.attach(None, 0), other.attach(None, 0)
    else:
        attach_both(exact, other)
        check_logits()
        with exact.adapter_disabled(), other.adapter_disabled():
            check_logits()
    assert set(other.trainable_names()) == set(exact.trainable_names())
    assert set(other.fingerprints()) == set(exact.fingerprints())
    for batch in batches_of(ROWS, 3):
        assert other.accumulate(batch, 0.2) == pytest.approx(exact.accumulate(batch, 0.2), rel=min(tolerance, 1e-5))
    found, wanted = gradients(other), gradients(exact)
    assert found.keys() == wanted.keys() == set(exact.trainable_names())
    assert other.gradient_norms() == pytest.approx(exact.gradient_norms(), rel=tolerance)

    def off(name: str) -> float:
        """MLX keeps GPT-2's matrices turned; one that is square does not show it."""
        turned = full and backend_of(other) == "mlx" and ".h." in name
        each = [found[name], found[name].T] if turned else [found[name]]
        return min(apart(one, wanted[name]) for one in each if one.shape == wanted[name].shape)

    assert {name: off(name) for name in wanted if off(name) > tolerance} == {}


def trace(session: Any) -> list[float]:
    """Loss and gradient norm of each of twenty steps, of two batches each."""
    session.prepare_updates(USUAL)
    told = []
    for number in range(20):
        batches = batches_of(make_rows(6, seed=number % 4), 4)
        targets = sum(batch.target_count for batch in batches)
        told.append(sum(session.accumulate(batch, 1 / targets) for batch in batches) / targets)
        told.append(session.clip_gradients())
        session.update(0.003)
    return told


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["reference-llama", "by torch", *SHAPES])
def test_reference_computes_what_torch_does_in_float64(kind: str, full: bool, tmp_path: Path) -> None:
    """The shipped model, one that torch made and awkward ones: nine digits of logits, losses and gradients."""
    if kind == "reference-llama":
        location = locate_model(kind)
    elif kind == "by torch":
        location = make_model("torch-llama", tmp_path, tie_word_embeddings=True, hidden_size=27).location
    else:
        config = {**IDS, **CONFIGS["llama"], **SHAPES[kind]}
        open_backend("reference").create(
            {key: value for key, value in config.items() if value is not None}, tmp_path, 3
        )
        location = ModelLocation(kind, tmp_path, "local")
    with widened():
        check_pair(open_in("torch64", location), open_in("reference", location), full=full, tolerance=1e-9)


@pytest.mark.parametrize("other", ["torch64", "mlx"])
def test_twenty_steps_are_the_references(other: str) -> None:
    """Twenty steps of the shipped model from one adapter: losses, gradient norms, and the logits at the end."""
    need(other.removesuffix("64"))
    tolerance = 1e-9 if other == "torch64" else 1e-4
    location = locate_model("reference-llama")
    with widened() if other == "torch64" else nullcontext():
        exact, session = open_in("reference", location), open_in(other, location)
        attach_both(exact, session, trained=False)
        wanted, found = trace(exact), trace(session)
        assert apart(logits(session, PROMPT), logits(exact, PROMPT)) < 100 * tolerance
    assert found[-2] < 0.8 * found[8]
    assert found == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("exact", "kind"), [("reference", "reference-llama"), ("torch", "reference-gpt2"), ("torch", "gpt2")]
)
def test_mlx_computes_what_others_do(exact: str, kind: str, full: bool, tmp_path: Path) -> None:
    """The shipped models and a tiny GPT-2: logits, losses and gradients to the digits of float32."""
    need("mlx")
    location = make_model("torch-gpt2", tmp_path, **NO_DROPOUT).location if kind == "gpt2" else locate_model(kind)
    check_pair(open_in(exact, location), open_in("mlx", location), full=full, tolerance=1e-4)


SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# How far the logits may be apart, as a share of the largest. mlx-lm computes Gemma's and StarCoder's GELU by another
# formula than transformers does, and rounds the scale of Gemma 3's embeddings to bfloat16.
ARCHITECTURES: dict[str, tuple[dict[str, Any], float]] = {
    "llama": ({"rope_parameters": LLAMA3}, 1e-5),
    "mistral": ({"sliding_window": 6}, 1e-5),
    "qwen2": ({"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 1e-5),
    "qwen3": ({}, 1e-5),
    "gemma": ({}, 3e-4),
    "gemma2": ({"sliding_window": 7}, 1e-5),
    "gemma3_text": (
        {
            "head_dim": 6,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
        3e-3,
    ),
    "phi3": ({}, 1e-5),
    "phi": ({"hidden_size": 32}, 1e-5),
    "granite": ({"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}, 1e-5),
    "cohere": ({"logit_scale": 0.3}, 1e-5),
    "cohere2": ({"num_hidden_layers": 4, "sliding_window": 5}, 1e-5),
    "olmo2": ({}, 1e-5),
    "smollm3": ({}, 1e-5),
    "glm4": ({}, 1e-5),
    "starcoder2": ({}, 5e-4),
    "stablelm": ({"hidden_size": 64}, 1e-5),
    "nemotron": ({"hidden_size": 32}, 1e-5),
    "ernie4_5": ({}, 1e-5),
    "seed_oss": ({}, 1e-5),
    "llama, linear rope": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 30.0, "factor": 4.0}}, 1e-5),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_torch_reads_once_what_rows_begin_with(kind: str, tmp_path: Path) -> None:
    """Rows that share a long prompt have the losses that each has alone, though the prompt is gone through once."""
    changes, _ = ARCHITECTURES[kind]
    settings = copy.deepcopy({**SIZES, "model_type": kind.partition(",")[0], **changes})
    open_backend("torch").create(settings, tmp_path, 5)
    session = open_in("torch", ModelLocation(kind, tmp_path, "local"))
    prompt, ends = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8), ((9, 7), (9, 3, 2, 3), (8,))
    rows = tuple(TokenizedRow((*prompt, *end), (False,) * 12 + (True,) * len(end), "a:1") for end in ends)
    alone = sum(session.loss(Batch((row,))) for row in rows)
    batch, read = Batch(rows), []
    assert shared_start(batch) == 11
    table = session.model.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, inputs, output: read.append(output.shape[:-1].numel()))
    together = session.loss(batch)
    hook.remove()
    assert read == [11, 3 * 5]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_mlx_computes_each_architecture_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """What opens computes what transformers computes, scales, caps and windows included, under the same names."""
    need("mlx")
    changes, tolerance = ARCHITECTURES[kind]
    model_type = kind.partition(",")[0]
    open_backend("torch").create(copy.deepcopy({**SIZES, "model_type": model_type, **changes}), tmp_path, 5)
    theirs, session = (open_in(name, ModelLocation(kind, tmp_path, "local")) for name in ("torch", "mlx"))
    context = session.forward_pass.sizes.context
    assert context == (changes["sliding_window"] if kind in ("mistral", "qwen2", "gemma2") else 40)
    ids = ROWS[3].ids[:context]
    assert apart(logits(session, ids), logits(theirs, ids)) < tolerance
    assert session.fingerprints().keys() == theirs.fingerprints().keys()
    rows = Batch(tuple(row for row in ROWS if len(row.ids) <= context))
    assert session.loss(rows) == pytest.approx(theirs.loss(rows), rel=max(2e-5, tolerance))


@given(LLAMAS | GPT2S, token_rows(1, 4))
@examples(1 / 2)
def test_adapters_of_every_kind_agree(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[TokenizedRow, ...]
) -> None:
    """A fresh adapter of any kind is the base; trained, its loss, gradients and logits agree in all backends."""
    need("mlx")
    location = write_model(model, tmp_path_factory.mktemp("model"))
    sessions = open_all(model, location)
    exact = sessions.get("reference") or in_float64(model, location)
    base = logits(open_bare(model, location)["torch"], PROMPT)
    assert all(apart(logits(session, PROMPT), base) < 1e-5 for session in sessions.values())  # nothing yet, exactly
    shaken({**sessions, "float64": exact})
    loss, wanted = exact.accumulate(Batch(rows), 0.2), gradients(exact)
    for session in sessions.values():
        assert set(session.trainable_names()) == set(exact.trainable_names())
        assert set(session.fingerprints()) == set(exact.fingerprints())
        if session is not exact:
            assert session.accumulate(Batch(rows), 0.2) == pytest.approx(loss, rel=1e-4, abs=1e-5)
            check_gradients(gradients(session), wanted)
        assert apart(logits(session, PROMPT), logits(exact, PROMPT)) < 1e-4
        with session.adapter_disabled():
            assert apart(logits(session, PROMPT), base) < 1e-5
        assert apart(logits(session, PROMPT), base) > 1e-3


@given(LLAMAS | GPT2S)
@examples(1 / 4)
def test_saved_adapters_load_in_peft(tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel) -> None:
    """An adapter of any kind that any backend saved loads in PEFT itself, and in every other, with the same logits."""
    need("mlx")
    location = write_model(model, tmp_path_factory.mktemp("model"))
    sessions = open_all(model, location)
    shaken(sessions)
    for name, session in sessions.items():
        saved = tmp_path_factory.mktemp("saved")
        session.save_adapter(saved)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(location.folder), str(saved)).eval()
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([PROMPT])).logits[0].double().numpy()
        assert apart(alone, logits(session, PROMPT)) < 1e-4
        for reader in sessions:
            again = open_in(reader, location)
            again.load_adapter(saved)
            assert apart(logits(again, PROMPT), logits(session, PROMPT)) < 1e-4
            assert again.trainable_names() == []
        if name != "torch":
            whole = tmp_path_factory.mktemp("whole")
            session.save_model(whole)
            merged = open_in("torch", ModelLocation("whole", whole, "local"))
            assert apart(logits(merged, PROMPT), logits(session, PROMPT)) < 1e-4


@given(adapted_models(model_configs(vocab_size=97)))
@examples(1 / 3)
def test_model_made_by_torch_has_the_shape_and_takes_the_adapter(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel
) -> None:
    """Llamas and GPT-2s have the drawn shape in their files, and PEFT adapts exactly the layers that were meant."""
    folder = tmp_path_factory.mktemp("drawn")
    open_backend("torch").create(model.config, folder, 0)
    assert read_shape(folder) == model.shape
    session = open_in("torch", ModelLocation("drawn", folder, "local"))
    session.attach(model.target, 0)
    session.prepare_updates(USUAL)
    adapted = {tensor.split(".lora_")[0].removeprefix("base_model.model.") for tensor in session.trainable_names()}
    assert adapted == {layer.name for layer in adapted_layers(model.shape, model.target)}
    assert session.loss(Batch(ROWS[3:5])) > 0
