"""What every backend's session says and saves: greedy answers, adapters and models that are had again, or refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import EvidenceError, ModelError, RefusedError, TrainingError
from finetune.evidence.reload import check_reload
from finetune.evidence.rounding import FACTOR, measure_rounding
from finetune.models.travel import public_name
from finetune.records import Batch, Optimization
from support.damages import ADAPTER_DAMAGES, SETTINGS, STATE, STATE_DAMAGES, WEIGHTS, changed_bytes
from support.sessions import (
    BENCHES,
    CONTEXT,
    FRAMEWORKS,
    MODULES,
    PROMPTS,
    Bench,
    adapter_bytes,
    all_logits,
    batches_of,
    logits,
    make_model,
    make_rows,
    need,
    random_state,
    step,
    train_a_little,
)
from support.tolerances import apart

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
PROMPT = ROWS[1].ids
every_backend = pytest.mark.parametrize("bench", BENCHES, indirect=True)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model in each backend that computes it."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Any:
    """A session whose adapter has been trained a little; tests that use it leave it as it was."""
    return bench.trained()


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Path:
    """The trained adapter in a folder."""
    adapter_bytes(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def greedy(session: Any, prompt: list[int], room: int, stops: list[int], *, rank: int = 1) -> list[int]:
    """The greedy answer by the book: the whole text again for each token, the likeliest one every time.

    Args:
        rank: 2 for the second likeliest every time.
    """
    ids = list(prompt)
    for _ in range(min(room, CONTEXT - len(prompt))):
        ids.append(int(logits(session, ids)[-1].argsort()[-rank]))
        if ids[-1] in stops:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@every_backend
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


@every_backend
def test_answers_are_of_the_tokens_that_are_chosen(trained: Any) -> None:
    """What chooses is given the logits of each next token, and its choice is said, until a stop or no more room."""
    given: list[Any] = []

    def second(seen: Any) -> Any:
        given.append(seen)
        return seen.argsort(axis=-1)[:, -2]

    free = trained.generate(PROMPTS, 9, [], second)
    assert free == [greedy(trained, prompt, 9, [], rank=2) for prompt in PROMPTS]
    assert free != trained.generate(PROMPTS, 9, [])
    stops = [free[0][4], free[1][0]]
    assert trained.generate(PROMPTS, 9, stops, second) == [
        greedy(trained, prompt, 9, stops, rank=2) for prompt in PROMPTS
    ]
    given.clear()
    [said] = trained.generate(PROMPTS[:1], 3, [], second)
    for place, seen in enumerate(given):
        assert np.allclose(seen[0], logits(trained, [*PROMPTS[0], *said[:place]])[-1], rtol=1e-4, atol=1e-4)
    assert len(given) == 3


@pytest.mark.parametrize("bench", ["torch-llama", "torch-gpt2"], indirect=True)
@pytest.mark.parametrize(
    "preferred",
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
def test_answers_are_greedy_whatever_the_model_prefers(bench: Bench, preferred: dict[str, Any], tmp_path: Path) -> None:
    """A model's own generation settings (sampling, penalties, beams) change no answer: it stays the likeliest one."""
    copy = bench.at(shutil.copytree(bench.location.folder, tmp_path / "model"))
    plain = copy.open().generate(PROMPTS, 8, [2])
    path = copy.location.folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **preferred}))
    session = copy.open()
    assert session.generate(PROMPTS, 8, [2]) == plain
    stop = plain[0][2]
    assert session.generate(PROMPTS, 8, [stop]) == [greedy(session, prompt, 8, [stop]) for prompt in PROMPTS]
    session.attach(copy.target(), 0)
    assert session.generate(PROMPTS, 8, [2]) == plain
    kept = session.model.generation_config.to_dict()
    assert {name: kept[name] for name in preferred} == preferred


@every_backend
def test_adapter_disabled_is_the_base(bench: Bench) -> None:
    """With the adapter disabled the model is its base to the bit; then it is itself again, and still trainable."""
    base, session = all_logits(bench.open()), bench.trained()
    tuned, names, marks = all_logits(session), session.trainable_names(), session.fingerprints()
    with session.adapter_disabled():
        assert np.array_equal(all_logits(session), base)
    assert np.array_equal(all_logits(session), tuned)
    assert (session.trainable_names(), session.fingerprints()) == (names, marks)
    step(session, batches_of(make_rows(3), 3))
    assert {name for name, mark in session.fingerprints().items() if mark != marks[name]} == set(names)


@pytest.mark.parametrize("bench", BENCHES[2:], indirect=True)
def test_adapter_attached_anew_replaces_the_old_one(bench: Bench) -> None:
    """A second adapter is as if it were the first; attaching none leaves the base."""
    once, plain, session = bench.adapted(seed=2), bench.open(), bench.trained()
    session.attach(bench.target(), 2)
    assert session.fingerprints() == once.fingerprints()
    session.attach(None, 0)
    assert session.fingerprints() == plain.fingerprints()
    assert np.array_equal(all_logits(session), all_logits(plain))


@every_backend
def test_adapter_loaded_is_the_adapter_and_frozen(bench: Bench, trained: Any, saved: Path, tmp_path: Path) -> None:
    """On a fresh base a saved adapter gives the same logits, is frozen and at rest, and is saved as it was."""
    session = bench.open()
    session.load_adapter(saved)
    assert apart(all_logits(session), all_logits(trained)) < (1e-5 if bench.backend == "reference" else 1e-30)
    assert session.trainable_names() == []
    before = session.fingerprints()
    with pytest.raises((RuntimeError, TrainingError), match=r"grad|trainable|frozen"):
        session.accumulate(Batch(make_rows(2)), 1.0)
    assert session.fingerprints() == before
    assert adapter_bytes(session, tmp_path / "again") == (saved / WEIGHTS).read_bytes()


def test_adapter_folder_holds_what_peft_writes(bench: Bench, trained: Any, saved: Path) -> None:
    """The folder has the adapter's tensors under PEFT's names and settings, scale included, nothing of the base."""
    tensors = load_file(saved / WEIGHTS)
    assert set(tensors) == {name.replace(".default", "") for name in trained.trainable_names()}
    path = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[bench.kind]
    inputs, outputs = {"llama": (21, 18), "gpt2": (20, 60)}[bench.kind]
    assert tensors[f"base_model.model.{path}.lora_A.weight"].shape == (3, inputs)
    assert tensors[f"base_model.model.{path}.lora_B.weight"].shape == (outputs, 3)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    written = json.loads((saved / SETTINGS).read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 7.0)
    assert written["base_model_name_or_path"] == public_name(bench.location)
    assert written["fan_in_fan_out"] is (bench.kind == "gpt2")
    shown = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): mark
        for name, mark in trained.fingerprints().items()
        if ".lora_" not in name
    }
    assert shown == bench.open().fingerprints()
    assert f"base_model.model.{path}.base_layer.weight" in trained.fingerprints()


LEFT_TO_PEFT = ("whole numbers", "use_rslora", "bias", "rank_pattern [", "alpha_pattern", "lora_dropout", "init_lora")
LEFT_TO_PEFT += ("a_new_kind", "modules_to_save ['norm']")
"""What torch leaves PEFT to read as it does."""
DAMAGED = [
    (bench, kind)
    for bench in BENCHES
    for kind in ADAPTER_DAMAGES
    if not (bench.startswith("torch") and kind.startswith(LEFT_TO_PEFT))
]


@pytest.mark.parametrize(("bench", "kind"), DAMAGED, indirect=["bench"])
def test_adapter_damaged_is_refused(bench: Bench, saved: Path, kind: str) -> None:
    """An adapter whose files are damaged, or of a kind that is not known, is refused and the model stays as it was."""
    ADAPTER_DAMAGES[kind](saved)
    session = bench.open() if bench.backend == "torch" else bench.adapted(seed=6)
    before = session.fingerprints()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="adapter"):
            session.load_adapter(saved)
    if bench.backend != "torch":
        assert session.fingerprints() == before
        assert step(session, batches_of(make_rows(3), 3)) > 0


def test_order_of_patterns_survives_the_file(tmp_path: Path) -> None:
    """Where two patterns fit one layer, the first counts in the session and in the file, though PEFT sorts by name."""
    for kind in ("llama", "gpt2"):
        bench = make_model(f"torch-{kind}", tmp_path / kind / "model")
        first, second = MODULES[kind][:2]
        patterns = {f"1.*{second}": 1, f".*{second}": 2, f".*{first}": 3}
        assert list(patterns) != sorted(patterns)
        session = bench.trained(bench.target(rank=2, alpha_pattern={key: 4.0 * rank for key, rank in patterns.items()}))
        folder = tmp_path / kind / "adapter"
        adapter_bytes(session, folder)
        assert list(json.loads((folder / SETTINGS).read_text())["alpha_pattern"]) == list(patterns)
        layers = {name: module for name, module in session.model.named_modules() if hasattr(module, "lora_A")}
        for name, module in layers.items():
            wanted = bench.target(rank=2, alpha_pattern={key: 4.0 * rank for key, rank in patterns.items()})
            assert module.scaling["default"] == wanted.scale_of(name.removeprefix("base_model.model.")), name
        assert len({module.scaling["default"] for module in layers.values()}) >= 3
        for backend in ("torch", "mlx"):
            again = bench.at(bench.location.folder, backend).open()
            again.load_adapter(folder)
            assert again.loss(Batch(ROWS)) == pytest.approx(session.loss(Batch(ROWS)), rel=1e-5), backend


def _off_by_a_hundredth(weight: Any, heads: int) -> Any:
    return weight * np.float32(1.01)


def _halves_swapped(weight: Any, heads: int) -> Any:
    """Each head's rows as the other convention of rotary positions has them."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _heads_swapped(weight: Any, heads: int) -> Any:
    """The first two heads in each other's place."""
    parts = weight.reshape(heads, -1, *weight.shape[1:])
    return parts[[1, 0, *range(2, heads)]].reshape(weight.shape)


@pytest.mark.parametrize("bench", [each for each in BENCHES if "llama" in each], indirect=True)
def test_what_rounding_allows_passes_no_fault_of_a_weight(bench: Bench, tmp_path: Path) -> None:
    """A tensor of base or adapter off by a hundredth, a wrong permutation and a swapped head exceed the bound."""
    session = bench.trained()
    allowed = FACTOR * measure_rounding(session, PROMPTS).logit
    adapter_bytes(session, tmp_path / "adapter")
    adapter, base = load_file(tmp_path / "adapter" / WEIGHTS), load_file(bench.location.folder / "model.safetensors")
    query = "model.layers.0.self_attn.q_proj.weight"
    shutil.copytree(bench.location.folder, tmp_path / "base")

    def off(name: str = "", fault: Any = None) -> float:
        """How far the largest logit is off once one tensor has a fault."""
        for tensors, path in ((adapter, tmp_path / "adapter" / WEIGHTS), (base, tmp_path / "base/model.safetensors")):
            changed = {name: np.ascontiguousarray(fault(tensors[name], 3))} if name in tensors else {}
            save_file({**tensors, **changed}, path, {"format": "pt"})
        again = bench.at(tmp_path / "base").open()
        again.load_adapter(tmp_path / "adapter")
        return float(np.abs(all_logits(again) - all_logits(session)).max())

    assert off() <= allowed
    hundredths = {name: off(name, _off_by_a_hundredth) for name in (*adapter, query, "lm_head.weight")}
    assert len(hundredths) == 14
    assert {name: each for name, each in hundredths.items() if each <= allowed} == {}
    assert off(query, _halves_swapped) > allowed
    assert off(query, _heads_swapped) > allowed


@every_backend
@pytest.mark.parametrize("kind", ["usual", "dora", "ia3", "saved", "full"])
def test_what_was_saved_works_in_a_fresh_process(
    bench: Bench, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A fresh process without our loading code finds the same logits, and not the base's, or says that it failed.

    Of the usual kind it imports the libraries itself, as a user's does; of others it begins with them imported.
    """
    if kind != "usual" and bench.backend != "reference":
        request.getfixturevalue("warm_children")
    session = bench.trained(bench.kinds(dropout=0.3)[kind] if kind != "usual" else "usual")
    session.check_saving()
    session.save_model(tmp_path) if kind == "full" else session.save_adapter(tmp_path)

    def reloaded(folder: Path) -> Any:
        return check_reload(bench.backend, session, bench.location, folder, prompts=PROMPTS, dtype="float32")

    found = reloaded(tmp_path)
    assert found.prompts == len(PROMPTS)
    assert found.largest_logit == pytest.approx(float(np.abs(all_logits(session)).max()))
    assert found.difference <= found.allowed == 16 * found.rounding < 1e-4 * found.largest_logit
    assert found.difference_from_base > 10 * found.allowed
    if bench.kind == "llama" and kind == "usual":
        with pytest.raises(EvidenceError, match="ended with code"):
            reloaded(tmp_path / "nowhere")
    if kind == "full":
        theirs = bench.at(tmp_path, "torch").open()
        assert theirs.loss(Batch(ROWS)) == pytest.approx(session.loss(Batch(ROWS)), rel=1e-5)


@every_backend
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "saved", "full"])
def test_resume_of_every_kind_is_the_same_run(bench: Bench, kind: str, tmp_path: Path) -> None:
    """Stopped before the first step or later and continued in a fresh session, all of the state is the same bytes."""
    target, pace = bench.kinds(dropout=0.3)[kind], Optimization(0.05, 1.0, loraplus_lr_ratio=3.0)
    for stop in (0, 2):
        half, ends = tmp_path / f"{stop}-half", []
        half.mkdir()
        # One after the other: torch's random state belongs to the process.
        for resumed in (False, True):
            session = bench.adapted(target, seed=9 if resumed else 4, optimization=pace)
            if resumed:
                step(session, batches_of(ROWS, 3), 0.5)
                session.load_state(half)
            else:
                train_a_little(session, stop)
                session.save_state(half)
            step(session, batches_of(ROWS, 3))
            end = tmp_path / f"{stop}-{resumed}"
            end.mkdir()
            session.save_state(end)
            ends.append(({path.name: path.read_bytes() for path in end.iterdir()}, session.fingerprints()))
        assert ends[0] == ends[1]


@every_backend
@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    bench: Bench, trained: Any, damage: str, tmp_path: Path
) -> None:
    """A state file with a tensor missing, unknown or of another form is refused, and nothing is touched by it."""
    trained.save_state(tmp_path)
    STATE_DAMAGES[damage](tmp_path)
    session = bench.adapted(seed=8)
    before = session.fingerprints(), random_state(session)
    with pytest.raises(RefusedError, match=r"does not fit|cannot be read: 'random'"):
        session.load_state(tmp_path)
    changed_bytes(STATE, lambda content: content[:-3])(tmp_path)
    with pytest.raises(RefusedError, match="cannot be read"):
        session.load_state(tmp_path)
    assert (session.fingerprints(), random_state(session)) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_saved_whole_is_the_same_model(bench: Bench, dtype: str, tmp_path: Path) -> None:
    """A fully trained model saved and opened again is the same to the bit."""
    session = bench.trained(None, dtype=dtype)
    session.save_model(tmp_path)
    again = bench.at(tmp_path).open(dtype=dtype)
    assert again.fingerprints() == session.fingerprints()
    assert again.fingerprints() != bench.open(dtype=dtype).fingerprints()
    assert apart(all_logits(again), all_logits(session)) < 1e-6


@every_backend
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_model_saved_is_the_adapted_one_and_the_session_stays(bench: Bench, kind: str, tmp_path: Path) -> None:
    """Read by transformers alone it computes the same, which the base does not; who wrote it is as before."""
    need("torch")
    session = bench.trained(bench.kinds()[kind])
    tuned, marks, loss = logits(session, PROMPT), session.fingerprints(), session.loss(Batch(ROWS))
    session.save_model(tmp_path)
    assert session.fingerprints() == marks
    assert np.array_equal(logits(session, PROMPT), tuned)
    assert session.loss(Batch(ROWS)) == loss
    merged, base = (bench.at(folder, "torch").open() for folder in (tmp_path, bench.location.folder))
    assert merged.fingerprints().keys() == base.fingerprints().keys()
    assert apart(logits(merged, PROMPT), tuned) < 1e-4
    assert apart(logits(base, PROMPT), tuned) > 1e-2
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / SETTINGS).exists()


def test_merged_in_half_precision_is_rounded_once(bench: Bench, tmp_path: Path) -> None:
    """Of a bfloat16 base and a float32 adapter the sum is made in float32: half a step of bfloat16 off."""
    import torch
    from safetensors.torch import load_file as load_torch

    session = bench.trained(bench.target(modules=MODULES[bench.kind][:2]), dtype="bfloat16")
    adapter_bytes(session, tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    session.save_model(tmp_path / "model")
    base = load_torch(bench.location.folder / "model.safetensors")
    adapter = load_torch(tmp_path / "adapter" / WEIGHTS)
    merged = load_torch(tmp_path / "model" / "model.safetensors")
    downs = [name for name in adapter if ".lora_A." in name]
    assert len(downs) >= 4
    for name in downs:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        growth = 7.0 / 3.0 * adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
        before = base[f"{path}.weight"].bfloat16().double()
        exact, found = before + (growth.t() if bench.kind == "gpt2" else growth), merged[f"{path}.weight"]
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-7).all(), name
        assert not torch.equal(found.double(), before), name
