"""Laws of what MLX sessions say and save: answers are greedy, and an adapter loads as it was or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from finetune.errors import EvidenceError, ModelError, RefusedError, TrainingError
from finetune.evidence.reload import check_reload
from finetune.records import Batch, ModelLocation
from finetune_strategies.profiles import examples
from support.damages import changed_settings, damaged_tensors, damages
from support.tiny_mlx import adapted, equal, furthest, logits_of, make_model, open_session
from support.tiny_models import (
    CONTEXT,
    VOCAB,
    adapter_bytes,
    batches_of,
    make_rows,
    step,
    target_of,
    train_a_little,
)

pytestmark = pytest.mark.tier2
KINDS = ("llama", "gpt2")
OTHER = {"llama": {"intermediate_size": 33, "hidden_size": 24}, "gpt2": {"n_embd": 25}}
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5], [10], [11, 12, 13, 14, 15, 16, 17], [9, 8]]
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module", params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(location: ModelLocation) -> Any:
    """A session whose adapter has been trained a little; laws that use it leave it as it was."""
    session = adapted(location)
    train_a_little(session)
    return session


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Path:
    """The trained adapter in a folder."""
    adapter_bytes(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def greedy(session: Any, prompt: list[int], room: int, stops: list[int]) -> list[int]:
    """The greedy answer by the book: the whole text again for each token, the likeliest one every time."""
    ids = list(prompt)
    for _ in range(min(room, CONTEXT - len(prompt))):
        ids.append(int(logits_of(session, [ids])[0][-1].argmax()))
        if ids[-1] in stops:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@given(st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=4), min_size=2, max_size=6))
@examples(1 / 6)
def test_answers_do_not_depend_on_who_else_is_asked(trained: Any, prompts: list[list[int]]) -> None:
    """Prompts of mixed lengths asked together get the answers each gets alone, in the order they were asked."""
    together = trained.generate(prompts, 6, [2, 7])
    assert together == [trained.generate([prompt], 6, [2, 7])[0] for prompt in prompts]
    assert trained.generate(prompts[::-1], 6, [2, 7]) == together[::-1]


def test_answers_are_greedy_and_end_before_the_stop(trained: Any) -> None:
    """Every token is the likeliest one; the prompt is not in the answer, nor is any stop token or what follows it."""
    free = trained.generate(PROMPTS, 9, [])
    assert free == [greedy(trained, prompt, 9, []) for prompt in PROMPTS]
    assert {len(answer) for answer in free} == {9}
    stops = [free[0][4], free[1][0]]
    stopped = trained.generate(PROMPTS, 9, stops)
    assert stopped == [greedy(trained, prompt, 9, stops) for prompt in PROMPTS]
    assert stopped[1] == []
    assert 0 < len(stopped[0]) <= 4
    assert not any(token in stops for answer in stopped for token in answer)


def test_answers_stay_within_the_context(trained: Any) -> None:
    """Prompt and answer together never exceed the context; a prompt that fills it has no answer, and is no error."""
    prompts = [[5] * length for length in (CONTEXT - 3, CONTEXT - 1, CONTEXT, CONTEXT + 5, 2)]
    answers = trained.generate(prompts, 10, [])
    assert [len(answer) for answer in answers] == [3, 1, 0, 0, 10]
    assert trained.generate([], 10, []) == []


def test_fresh_adapter_is_the_base(location: ModelLocation) -> None:
    """A new adapter (B = 0) changes no logit by a bit; a trained one does."""
    base = logits_of(open_session(location), PROMPTS)
    fresh = adapted(location)
    assert equal(base, logits_of(fresh, PROMPTS))
    train_a_little(fresh)
    assert furthest(base, logits_of(fresh, PROMPTS)) > 0.1


def test_adapter_disabled_is_the_base(location: ModelLocation) -> None:
    """With the adapter disabled the model is its base to the bit; then it is itself again, and still trainable."""
    base = logits_of(open_session(location), PROMPTS)
    session = adapted(location)
    train_a_little(session)
    tuned, names, marks = logits_of(session, PROMPTS), session.trainable_names(), session.fingerprints()
    with session.adapter_disabled():
        assert equal(logits_of(session, PROMPTS), base)
    assert equal(logits_of(session, PROMPTS), tuned)
    assert (session.trainable_names(), session.fingerprints()) == (names, marks)
    step(session, batches_of(make_rows(3), 3))
    assert {name for name, mark in session.fingerprints().items() if mark != marks[name]} == set(names)


def test_adapter_attached_anew_replaces_the_old_one(location: ModelLocation) -> None:
    """A second adapter is as if it were the first; attaching none leaves the base."""
    session, once = adapted(location, seed=1), adapted(location, seed=2)
    plain = open_session(location)
    train_a_little(session)
    session.attach(target_of(location.name), 2)
    assert session.fingerprints() == once.fingerprints()
    session.attach(None, 0)
    assert session.fingerprints() == plain.fingerprints()
    assert equal(logits_of(session, PROMPTS), logits_of(plain, PROMPTS))


def test_adapter_saved_and_loaded_is_the_adapter_and_frozen(
    location: ModelLocation, trained: Any, saved: Path, tmp_path: Path
) -> None:
    """P-ART: on a fresh base a saved adapter gives the same logits to the bit, is frozen, and is saved as it was."""
    wanted = logits_of(trained, PROMPTS)
    session = open_session(location)
    base = logits_of(session, PROMPTS)
    session.load_adapter(saved)
    assert equal(logits_of(session, PROMPTS), wanted)
    assert furthest(wanted, base) > 0.1
    with session.adapter_disabled():
        assert equal(logits_of(session, PROMPTS), base)
    assert session.trainable_names() == []
    with pytest.raises(TrainingError, match="frozen"):
        session.accumulate(Batch(make_rows(2)), 1.0)
    assert adapter_bytes(session, tmp_path / "again") == (saved / WEIGHTS).read_bytes()


def test_adapter_folder_holds_what_peft_reads(location: ModelLocation, trained: Any, saved: Path) -> None:
    """The folder has the adapter's tensors under PEFT's names and settings, scale included, nothing of the base."""
    tensors = load_file(saved / WEIGHTS)
    assert set(tensors) == {name.replace(".default", "") for name in trained.trainable_names()}
    path = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[location.name]
    sizes = {"llama": (21, 18), "gpt2": (20, 60)}[location.name]
    assert tensors[f"base_model.model.{path}.lora_A.weight"].shape == (3, sizes[0])
    assert tensors[f"base_model.model.{path}.lora_B.weight"].shape == (sizes[1], 3)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    written = json.loads((saved / SETTINGS).read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 7.0)
    assert written["base_model_name_or_path"] == str(location.folder)
    assert written["fan_in_fan_out"] is (location.name == "gpt2")
    kept = open_session(location).fingerprints()
    prefix = "base_model.model."
    shown = {
        name.removeprefix(prefix).replace(".base_layer", ""): mark for name, mark in trained.fingerprints().items()
    }
    assert {name: mark for name, mark in shown.items() if ".lora_" not in name} == kept
    assert f"{prefix}{path}.base_layer.weight" in trained.fingerprints()


ADAPTER_DAMAGES = damages(WEIGHTS, SETTINGS) | {
    f"{key} {value}": changed_settings(SETTINGS, **{key: value})
    for key, value in [
        ("use_dora", True),
        ("use_rslora", 2),
        ("rank_pattern", {"q_proj|c_fc|c_attn": 2}),
        ("r", 2),
        ("r", "absent"),
        ("lora_alpha", "7"),
        ("peft_type", "IA3"),
        ("target_modules", ["q_prj"]),
        ("modules_to_save", ["lm_head"]),
    ]
}


@pytest.mark.parametrize("kind", ADAPTER_DAMAGES)
def test_adapter_damaged_is_refused(location: ModelLocation, saved: Path, kind: str) -> None:
    """An adapter whose files are damaged, or of a kind that is not known, is refused and the model stays as it was."""
    assert len(ADAPTER_DAMAGES) == 21
    ADAPTER_DAMAGES[kind](saved)
    session = adapted(location, seed=6)
    before = session.fingerprints()
    with pytest.raises(ModelError, match="adapter"):
        session.load_adapter(saved)
    assert session.fingerprints() == before
    assert step(session, batches_of(make_rows(3), 3)) > 0


def test_adapter_of_another_model_is_refused(location: ModelLocation, saved: Path, tmp_path: Path) -> None:
    """An adapter is refused on a model of other sizes, of more layers, and of another family."""
    deeper = {"llama": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}}[location.name]
    family = next(kind for kind in KINDS if kind != location.name)
    for other in (
        make_model(location.name, tmp_path / "sizes", **OTHER[location.name]),
        make_model(location.name, tmp_path / "deeper", **deeper),
        make_model(family, tmp_path / "family"),
    ):
        with pytest.raises(ModelError, match="adapter"):
            open_session(other).load_adapter(saved)


def test_adapter_in_a_fresh_process_gives_the_same_logits(
    location: ModelLocation, trained: Any, saved: Path, tmp_path: Path
) -> None:
    """A fresh process finds the same logits, different from the base's; one without the adapter says it failed."""
    found = check_reload("mlx", trained, location, saved, prompts=PROMPTS, dtype="float32")
    assert found.prompts == len(PROMPTS)
    assert found.difference <= 1e-4
    assert found.difference_from_base > 0.1
    assert found.largest_logit == pytest.approx(max(float(np.abs(each).max()) for each in logits_of(trained, PROMPTS)))
    if location.name == "llama":
        with pytest.raises(EvidenceError, match="ended with code"):
            check_reload("mlx", trained, location, tmp_path / "nowhere", prompts=PROMPTS, dtype="float32")


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return damaged_tensors("state.safetensors", change)


@pytest.mark.parametrize(
    "change",
    [
        _state(lambda tensors: tensors.pop("random")),
        _state(lambda tensors: tensors.pop(min(tensors))),
        _state(lambda tensors: tensors.update({max(tensors): np.zeros((2, 2), np.float32)})),
        _state(lambda tensors: tensors.update({"weight/more": np.zeros(1, np.float32)})),
        _state(lambda tensors: tensors.update({"steps": np.float32(3).reshape(())})),
    ],
    ids=["random", "moment", "shape", "more", "kind"],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    location: ModelLocation, trained: Any, change: Callable[[Path], None], tmp_path: Path
) -> None:
    """A state file with a tensor missing, unknown or of another form is refused, and no weight is touched by it."""
    trained.save_state(tmp_path)
    change(tmp_path)
    session = adapted(location, seed=8)
    before = session.fingerprints(), np.array(session._key).tolist(), session.optimizer.steps
    with pytest.raises(RefusedError, match="does not fit"):
        session.load_state(tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RefusedError, match="cannot be read"):
        session.load_state(tmp_path)
    assert (session.fingerprints(), np.array(session._key).tolist(), session.optimizer.steps) == before
