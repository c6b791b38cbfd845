"""Laws of what torch sessions say and save: answers are greedy, and an adapter loads as it was or not at all."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
peft = pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from safetensors.torch import load_file, save_file  # noqa: E402

from finetune.errors import EvidenceError, ModelError, RefusedError  # noqa: E402
from finetune.evidence.reload import check_reload  # noqa: E402
from finetune.records import ModelLocation  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402
from support.tiny_models import (  # noqa: E402
    CONTEXT,
    VOCAB,
    adapted,
    adapter_bytes,
    batches_of,
    make_model,
    make_rows,
    open_session,
    step,
    target_of,
    train_a_little,
)

pytestmark = pytest.mark.tier2
KINDS = ("llama", "gpt2")
OTHER = {
    "llama": {"intermediate_size": 33, "hidden_size": 24},
    "gpt2": {"n_embd": 25},
}
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5], [10], [11, 12, 13, 14, 15, 16, 17], [9, 8]]


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


def logits_of(session: Any, folder: Path, name: str = "logits") -> list[Any]:
    """The session's logits on the prompts."""
    session.save_logits(PROMPTS, folder / name)
    found = load_file(folder / name)
    return [found[str(index)] for index in range(len(PROMPTS))]


def equal(first: list[Any], second: list[Any]) -> bool:
    """Whether all logits are equal to the bit."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def furthest(first: list[Any], second: list[Any]) -> float:
    """The largest difference of logits."""
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def greedy(session: Any, prompt: list[int], room: int, stops: list[int], folder: Path) -> list[int]:
    """The greedy answer by the book: the whole text again for each token, the likeliest one every time."""
    ids = list(prompt)
    for _ in range(min(room, CONTEXT - len(prompt))):
        session.save_logits([ids], folder / "step")
        ids.append(int(load_file(folder / "step")["0"][-1].argmax()))
        if ids[-1] in stops:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@given(st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=4), min_size=2, max_size=6))
@examples(1 / 8)
def test_answers_do_not_depend_on_who_else_is_asked(trained: Any, prompts: list[list[int]]) -> None:
    """Prompts of mixed lengths asked together get the answers each gets alone, in the order they were asked."""
    together = trained.generate(prompts, 6, [2, 7])
    assert together == [trained.generate([prompt], 6, [2, 7])[0] for prompt in prompts]
    assert trained.generate(prompts[::-1], 6, [2, 7]) == together[::-1]


def test_answers_are_greedy_and_end_before_the_stop(trained: Any, tmp_path: Path) -> None:
    """Every token is the likeliest one; the prompt is not in the answer, nor is any stop token or what follows it."""
    free = trained.generate(PROMPTS, 9, [])
    assert free == [greedy(trained, prompt, 9, [], tmp_path) for prompt in PROMPTS]
    assert {len(answer) for answer in free} == {9}
    stops = [free[0][4], free[1][0]]
    stopped = trained.generate(PROMPTS, 9, stops)
    assert stopped == [greedy(trained, prompt, 9, stops, tmp_path) for prompt in PROMPTS]
    assert stopped[1] == []
    assert 0 < len(stopped[0]) <= 4
    assert not any(token in stops for answer in stopped for token in answer)


@pytest.mark.parametrize(
    "settings_",
    [
        {"do_sample": True, "temperature": 5.0},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 60))},
        {"num_beams": 3},
        {"min_new_tokens": 9, "eos_token_id": [2]},
    ],
    ids=lambda each: next(iter(each)),
)
def test_answers_are_greedy_whatever_the_model_prefers(
    location: ModelLocation, settings_: dict[str, Any], tmp_path: Path
) -> None:
    """A model's own generation settings (sampling, penalties, beams) change no answer: it stays the likeliest one."""
    copy = shutil.copytree(location.folder, tmp_path / "model")
    plain = open_session(ModelLocation(location.name, copy, "local")).generate(PROMPTS, 8, [2])
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings_}))
    session = open_session(ModelLocation(location.name, copy, "local"))
    assert session.generate(PROMPTS, 8, [2]) == plain
    stop = plain[0][2]
    assert session.generate(PROMPTS, 8, [stop]) == [greedy(session, prompt, 8, [stop], tmp_path) for prompt in PROMPTS]
    session.attach(target_of(location.name), 0)
    assert session.generate(PROMPTS, 8, [2]) == plain
    kept = session.model.generation_config.to_dict()
    assert {name: kept[name] for name in settings_} == settings_


def test_answers_stay_within_the_context(trained: Any) -> None:
    """Prompt and answer together never exceed the context; a prompt that fills it has no answer, and is no error."""
    prompts = [[5] * length for length in (CONTEXT - 3, CONTEXT - 1, CONTEXT, CONTEXT + 5, 2)]
    answers = trained.generate(prompts, 10, [])
    assert [len(answer) for answer in answers] == [3, 1, 0, 0, 10]
    assert trained.generate([], 10, []) == []


def test_fresh_adapter_is_the_base(location: ModelLocation, tmp_path: Path) -> None:
    """A new adapter (B = 0) changes no logit by a bit; a trained one does."""
    session = open_session(location)
    base = logits_of(session, tmp_path)
    fresh = adapted(location)
    assert equal(base, logits_of(fresh, tmp_path))
    train_a_little(fresh)
    assert furthest(base, logits_of(fresh, tmp_path)) > 0.1


def test_adapter_disabled_is_the_base(location: ModelLocation, tmp_path: Path) -> None:
    """With the adapter disabled the model is its base to the bit; then it is itself again, and still trainable."""
    base = logits_of(open_session(location), tmp_path)
    session = adapted(location)
    train_a_little(session)
    tuned, names, marks = logits_of(session, tmp_path), session.trainable_names(), session.fingerprints()
    with session.adapter_disabled():
        assert equal(logits_of(session, tmp_path), base)
    assert equal(logits_of(session, tmp_path), tuned)
    assert (session.trainable_names(), session.fingerprints()) == (names, marks)
    step(session, batches_of(make_rows(3), 3))
    assert {name for name, mark in session.fingerprints().items() if mark != marks[name]} == set(names)


def test_adapter_saved_and_loaded_gives_the_same_logits(
    location: ModelLocation, trained: Any, saved: Path, tmp_path: Path
) -> None:
    """A saved adapter on a fresh base gives the same logits: to the bit by our loader, nearly so by PEFT alone."""
    wanted = logits_of(trained, tmp_path)
    session = open_session(location)
    base = logits_of(session, tmp_path)
    session.load_adapter(saved)
    assert equal(logits_of(session, tmp_path), wanted)
    assert furthest(wanted, base) > 0.1
    assert not any(module.training for module in session.model.modules())
    with session.adapter_disabled():
        assert equal(logits_of(session, tmp_path), base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(location.folder)
    alone = peft.PeftModel.from_pretrained(plain, str(saved)).eval()
    with torch.no_grad():
        found = [alone(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS]
    assert furthest(found, wanted) < 1e-5


def test_adapter_folder_holds_what_peft_writes(location: ModelLocation, trained: Any, saved: Path) -> None:
    """The folder has the adapter's tensors and settings, scale included, and nothing of the base."""
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == len(trained.trainable_names())
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    written = json.loads((saved / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 7.0)
    assert written["base_model_name_or_path"] == str(location.folder)
    assert written["fan_in_fan_out"] is (location.name == "gpt2")


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def _renamed(tensors: dict[str, Any]) -> None:
    name = max(tensors)
    tensors[name.replace("layers.1", "layers.7").replace("h.1", "h.7")] = tensors.pop(name)


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _garbage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 400)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "renamed": _tensors(_renamed),
    "dropped": _tensors(lambda tensors: tensors.pop(min(tensors))),
    "all dropped": _tensors(lambda tensors: [tensors.pop(name) for name in list(tensors)]),
    "added": _tensors(lambda tensors: tensors.update({max(tensors) + "2": tensors[max(tensors)].clone()})),
    "reshaped": _tensors(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].T.contiguous()})),
    "cut off": _cut,
    "garbage": _garbage,
    "no tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no settings": lambda folder: (folder / "adapter_config.json").unlink(),
    "broken settings": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "settings of nothing": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "empty settings": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_adapter_damaged_is_refused(location: ModelLocation, saved: Path, kind: str) -> None:
    """An adapter that is renamed, dropped, added to, reshaped, cut off or otherwise broken is refused by its name."""
    assert len(DAMAGES) == 12
    DAMAGES[kind](saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="adapter"):
            open_session(location).load_adapter(saved)


def test_adapter_of_another_model_is_refused(location: ModelLocation, saved: Path, tmp_path: Path) -> None:
    """An adapter is refused on a model of other sizes, of more layers, and of another family."""
    deeper = {"llama": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}}[location.name]
    family = next(kind for kind in KINDS if kind != location.name)
    others = [
        make_model(location.name, tmp_path / "sizes", **OTHER[location.name]),
        make_model(location.name, tmp_path / "deeper", **deeper),
        make_model(family, tmp_path / "family"),
    ]
    for other in others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ModelError, match="adapter"):
                open_session(other).load_adapter(saved)


def test_adapter_in_a_fresh_process_gives_the_same_logits(
    location: ModelLocation, trained: Any, saved: Path, tmp_path: Path
) -> None:
    """A fresh process finds the same logits, different from the base's; one without the adapter says it failed."""
    found = check_reload("torch", trained, location, saved, prompts=PROMPTS, dtype="float32")
    assert found.prompts == len(PROMPTS)
    assert found.difference <= 1e-4
    assert found.difference_from_base > 0.1
    assert found.largest_logit == pytest.approx(max(float(each.abs().max()) for each in logits_of(trained, tmp_path)))
    if location.name == "llama":
        with pytest.raises(EvidenceError, match="ended with code"):
            check_reload("torch", trained, location, tmp_path / "nowhere", prompts=PROMPTS, dtype="float32")


def test_base_without_a_weight_is_refused(location: ModelLocation, tmp_path: Path) -> None:
    """A base from which a weight is missing, or whose file is cut off, is refused: no weight is ever made up."""
    for number, damage in enumerate(("dropped", "reshaped", "cut off", "config")):
        folder = shutil.copytree(location.folder, tmp_path / str(number))
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = max(key for key in tensors if "layers.1" in key or "h.1." in key)
        if damage == "cut off":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "config":
            (folder / "config.json").write_text('{"model_type": "nonsense"}')
        else:
            tensors[name] = torch.zeros(13)
            save_file({key: value for key, value in tensors.items() if key != name or damage == "reshaped"}, path)
        with pytest.raises(ModelError, match=str(folder) if damage in ("cut off", "config") else "lacks|cannot be"):
            open_session(ModelLocation(location.name, folder, "local"))


def _swapped(tensors: dict[str, Any]) -> None:
    name = max(name for name in tensors if name.startswith("weight/"))
    tensors[name] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("random"),
        lambda tensors: tensors.pop(min(tensors)),
        _swapped,
        lambda tensors: tensors.update({"weight/more": torch.zeros(1)}),
    ],
    ids=["random", "moment", "shape", "more"],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    location: ModelLocation, trained: Any, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """A state file with a tensor missing, unknown or of another shape is refused, and no weight is touched by it."""
    trained.save_state(tmp_path)
    path = tmp_path / "state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    session = adapted(location, seed=8)
    before = session.fingerprints(), torch.get_rng_state()
    with pytest.raises(RefusedError, match="does not fit"):
        session.load_state(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RefusedError, match="cannot be read"):
        session.load_state(tmp_path)
    assert session.fingerprints() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_model_saved_whole_is_the_same_model(location: ModelLocation, tmp_path: Path) -> None:
    """A fully trained model saved and opened again is the same to the bit."""
    session = open_session(location)
    session.attach(None, 0)
    with torch.no_grad():
        for value in session.model.parameters():
            value.add_(0.01)
    (tmp_path / "model").mkdir()
    session.save_model(tmp_path / "model")
    again = open_session(ModelLocation(location.name, tmp_path / "model", "local"))
    assert again.fingerprints() == session.fingerprints()
    assert equal(logits_of(again, tmp_path), logits_of(session, tmp_path))
