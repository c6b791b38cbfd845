"""New tokens are added to tokenizer and tables, their rows alone are trained, and everybody reads them the same."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.backends import open_backend
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig
from finetune.errors import ConfigError, FineTuneError, ModelError
from finetune.evidence.rounding import FACTOR, measure_rounding
from finetune.export.gguf import export
from finetune.export.merge import merge
from finetune.export.new_tokens import add_tokens, with_new_tokens
from finetune.export.result import open_result
from finetune.export.vocabulary import CONTROL, USER_DEFINED
from finetune.models.shape import read_shape, token_tables
from finetune.records import AdapterTarget, ModelLocation, Optimization, Quantization
from finetune.train import fine_tune
from support.gguf_models import gpt2_like, make_model
from support.sessions import adapter_bytes, all_logits, batches_of, make_rows, need, step
from support.workplace import settings, without_reload_check

pytestmark = [pytest.mark.tier2, pytest.mark.usefixtures("warm_children")]
KNOWN = 600
"""How many tokens the tokenizer of these models has."""
NEW = {"<|call|>": True, "<tool>": False, "</tool>": False}
IDS = (600, 601, 602)
FAMILIES = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True, "n_inner": 360}),
}
PROMPTS = [[5, 600, 7, 601], [8, 9, 602], [600], [11, 12, 13, 14]]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_size = pytest.mark.parametrize("rows", [KNOWN, 601, 640])
"""No row is left for new tokens, one, or all that are needed: the tables grow, or rows that nobody used are taken."""


def plain_model(folder: Path, family: str, rows: int = KNOWN) -> ModelLocation:
    """A tiny random model with tables of so many rows, whose tokenizer knows no token of `NEW`."""
    kind, changes = FAMILIES[family]
    make_model(kind, folder, vocab_size=rows, **changes)
    gpt2_like(folder)
    return ModelLocation(family, folder, "local")


def grown_model(place: Path, family: str, rows: int = KNOWN) -> tuple[ModelLocation, ModelLocation]:
    """A model, and the same with the new tokens."""
    base = plain_model(place / "base", family, rows)
    add_tokens(base, FileTokenizer(base.folder), NEW, place / "grown")
    return base, ModelLocation(family, place / "grown", "local")


def tables_of(folder: Path) -> list[str]:
    """The embedding, and the head where it is a table of its own."""
    return token_tables(read_shape(folder))


def weights_in(folder: Path) -> dict[str, Any]:
    """Every weight of a model folder."""
    return load_file(folder / "model.safetensors")


@every_family
@every_size
def test_a_model_with_new_tokens_says_what_it_said(family: str, rows: int, tmp_path: Path) -> None:
    """Every old row keeps its bytes, and a new token gets at most 1 / n of the probability, n tokens being known.

    transformers' tokenizer and model take the folder as it is, and give old text the ids that it had.
    """
    need("torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, grown = grown_model(tmp_path, family, rows)
    before, after = weights_in(base.folder), weights_in(grown.folder)
    assert before.keys() == after.keys()
    tables = tables_of(grown.folder)
    assert len(tables) == (2 if family == "untied" else 1)
    for name, weight in before.items():
        if name in tables:
            assert after[name].shape == (max(rows, 603), weight.shape[1])
            old = [row for row in range(rows) if row not in IDS]
            assert after[name][old].tobytes() == weight[old].tobytes()
            mean = weight[:KNOWN].astype(np.float64).mean(axis=0)
            assert np.allclose(after[name][list(IDS)], mean, rtol=1e-6, atol=1e-7)
        else:
            assert after[name].tobytes() == weight.tobytes()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(grown.folder)(input_ids=torch.arange(3, 40)[None]).logits[0]
        plain = AutoModelForCausalLM.from_pretrained(base.folder)(input_ids=torch.arange(3, 40)[None]).logits[0]
    chances = logits.double().softmax(-1)[:, list(IDS)]
    assert 0 < float(chances.max()) <= (1 + 1e-5) / KNOWN
    assert torch.allclose(logits[:, :KNOWN], plain[:, :KNOWN], rtol=0, atol=1e-4)
    tokenizer, own = AutoTokenizer.from_pretrained(grown.folder), FileTokenizer(grown.folder, tuple(NEW))
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == list(IDS) == list(own.learned_ids)
    assert tokenizer.encode("1 <tool>2</tool>", add_special_tokens=False)[-3:] == [601, tokenizer.encode("2")[-1], 602]
    old_text = "the tool </ tool> 12 and call"
    assert FileTokenizer(base.folder).encode_content(old_text) == own.encode_content(old_text)
    said = [600, *own.encode_content("a"), 601, 602]
    assert (own.decode(said), own.decode(said, control=True)) == ("a<tool></tool>", "<|call|>a<tool></tool>")


def train(session: Any) -> None:
    """A few steps over random tokens, in every row one of the new ones, but for the last of those: nobody reads it."""
    for number in range(3):
        rows = [
            replace(row, ids=(*row.ids[:-2], IDS[place % 2], row.ids[-1]), trained=(*row.trained[:-2], True, True))
            for place, row in enumerate(make_rows(5, seed=number))
        ]
        step(session, batches_of(rows, 2), 0.05)


@dataclass(frozen=True)
class Trained:
    """A session that has trained the rows of new tokens, beside the model without them."""

    base: ModelLocation
    grown: ModelLocation
    session: Any
    frozen: dict[str, str]
    """The fingerprints of what was not to be trained, before it was."""


MODULES = {"untied": ("q_proj", "down_proj"), "tied": ("v_proj", "up_proj"), "gpt2": ("c_attn",)}


def trained_with(backend: str, family: str, place: Path, rows: int = KNOWN, **opening: Any) -> Trained:
    """A session of a backend that has gone a few steps over rows of random tokens, the new ones with them."""
    need(backend)
    base, grown = grown_model(place, family, rows)
    device = {"device": "cpu"} if backend == "torch" else {}
    session = open_backend(backend).open(grown, "float32", 0, **device, **opening)
    tables = [name.removesuffix(".weight") for name in tables_of(grown.folder)]
    target = AdapterTarget(3, 7.0, 0.0, MODULES[family], rows=dict.fromkeys(tables, IDS))
    session.attach(target, 0)
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    before, own = session.fingerprints(), set(session.trainable_names())
    train(session)
    return Trained(base, grown, session, {name: hashed for name, hashed in before.items() if name not in own})


every_backend = pytest.mark.parametrize(
    ("backend", "family"),
    [
        (backend, family)
        for backend in ("torch", "mlx", "reference")
        for family in FAMILIES
        if (backend, family) != ("reference", "gpt2")
    ],
)


@every_backend
def test_only_those_rows_of_the_tables_are_trained(backend: str, family: str, tmp_path: Path) -> None:
    """Of the merged model each table differs in the new rows and in no bit of another; nothing frozen has moved."""
    found = trained_with(backend, family, tmp_path)
    now = found.session.fingerprints()
    assert {name: now[name] for name in found.frozen} == found.frozen
    (tmp_path / "merged").mkdir()
    found.session.save_model(tmp_path / "merged")
    before, after = weights_in(found.grown.folder), weights_in(tmp_path / "merged")
    for name in tables_of(found.grown.folder):
        changed = np.flatnonzero((before[name] != after[name]).any(axis=1))
        assert tuple(changed) == IDS


@every_backend
@pytest.mark.parametrize("rows", [KNOWN, 640])
def test_peft_loads_what_was_trained(backend: str, family: str, rows: int, tmp_path: Path) -> None:
    """PEFT puts the adapter on the base itself, its tables resized by transformers where they were too short."""
    need("torch")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = trained_with(backend, family, tmp_path, rows)
    adapter_bytes(found.session, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(found.base.folder)
    if rows < 603:
        model.resize_token_embeddings(603)
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        read = torch.cat([adapted(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS]).numpy()
    bound = FACTOR * measure_rounding(found.session, PROMPTS).logit
    assert np.abs(all_logits(found.session, PROMPTS)[:, :603] - read[:, :603]).max() <= bound
    base = open_backend("torch").open(found.grown, "float32", 0, device="cpu")
    assert np.abs(all_logits(base, PROMPTS)[:, :603] - read[:, :603]).max() > 100 * bound


@every_backend
def test_rows_are_had_again(backend: str, family: str, tmp_path: Path) -> None:
    """A saved adapter gives the same logits; training goes on from a saved state to the same bits."""
    found = trained_with(backend, family, tmp_path)
    adapter_bytes(found.session, tmp_path / "adapter")
    device = {"device": "cpu"} if backend == "torch" else {}
    again = open_backend(backend).open(found.grown, "float32", 0, **device)
    again.load_adapter(tmp_path / "adapter")
    bound = FACTOR * measure_rounding(found.session, PROMPTS).logit
    assert np.abs(all_logits(again, PROMPTS) - all_logits(found.session, PROMPTS)).max() <= bound
    (tmp_path / "state").mkdir()
    found.session.save_state(tmp_path / "state")
    train(found.session)
    other = open_backend(backend).open(found.grown, "float32", 0, **device)
    tables = [name.removesuffix(".weight") for name in tables_of(found.grown.folder)]
    other.attach(AdapterTarget(3, 7.0, 0.0, MODULES[family], rows=dict.fromkeys(tables, IDS)), 9)
    other.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
    other.load_state(tmp_path / "state")
    train(other)
    assert other.fingerprints() == found.session.fingerprints()


@pytest.mark.parametrize("family", ["untied", "tied"])
def test_rows_are_trained_beside_a_quantised_base(family: str, tmp_path: Path) -> None:
    """Packed tables keep every byte; the saved rows, put on the base again as it is quantised, give the same logits."""
    need("mlx")
    found = trained_with("mlx", family, tmp_path, quantize=Quantization(4, 32))
    now = found.session.fingerprints()
    assert {name: now[name] for name in found.frozen} == found.frozen
    assert any(name.endswith("embed_tokens.token_adapter.base_layer.scales") for name in found.frozen)
    adapter_bytes(found.session, tmp_path / "adapter")
    again = open_backend("mlx").open(found.grown, "float32", 0, quantize=Quantization(4, 32))
    base = all_logits(again, PROMPTS)
    again.load_adapter(tmp_path / "adapter")
    bound = FACTOR * measure_rounding(found.session, PROMPTS).logit
    assert np.abs(all_logits(again, PROMPTS) - all_logits(found.session, PROMPTS)).max() <= bound
    with again.adapter_disabled():
        assert (all_logits(again, PROMPTS) == base).all()


def data_with(path: Path) -> Path:
    """Rows whose answers hold the new tokens, and whose questions name them."""
    rows = [{"prompt": f"say <tool> {n} " * (1 + n % 3), "completion": f"<tool>{n}</tool>"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_with(place: Path, family: str, backend: str, rows: int = KNOWN, **changes: Any) -> tuple[LoadedConfig, Path]:
    """The settings of a run that learns the new tokens, and the finished run."""
    base = plain_model(place / "base", family, rows)
    modules = list(MODULES[family])
    chosen = {"backend": backend, "adapter__target_modules": modules, "training__learning_rate": 0.02}
    chosen |= {"tokens__add_special_tokens": ["<|call|>"], "tokens__add_tokens": ["<tool>", "</tool>"], **changes}
    loaded = settings(base.folder, data_with(place / "rows.jsonl"), **chosen)
    return loaded, place / "run"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models with new tokens are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune" / "new-tokens"


@every_backend
def test_a_run_learns_merges_and_asks_with_new_tokens(backend: str, family: str, tmp_path: Path, cache: Path) -> None:
    """In answers the tokens are meant and learned; in questions their names are text; the merged model has them.

    A second run on the merged model makes no other folder and trains the same rows.
    """
    need("torch", backend)
    from transformers import AutoTokenizer

    loaded, place = run_with(tmp_path, family, backend)
    with without_reload_check():
        run, record = fine_tune(loaded, output=place)
    assert "'<tool>' (id 601) in 9" in " ".join(record["notes"])
    assert "'<|call|>' (id 600) in 0" in " ".join(record["notes"])
    assert len(list(cache.iterdir())) == 1
    result = open_result(run, open_backend)
    row = result.prepare().train.rows[0]
    assert [number for number, trained in zip(row.ids, row.trained, strict=True) if trained and number in IDS] == [
        601,
        602,
    ]
    assert [number for number in row.ids if number in IDS] == [601, 602]
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    merged = merge(run, output=None, dtype=None).path
    for name in tables_of(merged):
        saved = next(each for key, each in adapter.items() if f"{name.removesuffix('.weight')}.token_adapter" in key)
        assert (weights_in(merged)[name][list(IDS)] == saved).all()
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(list(NEW)) == list(IDS)
    changed = loaded.config.model.model_copy(update={"path": str(merged)})
    second = LoadedConfig(loaded.config.model_copy(update={"model": changed}), loaded.origins)
    told: list[str] = []
    assert with_new_tokens(second, tell=told.append) == second
    assert "3 of the tokens to learn are in the tokenizer already" in " ".join(told)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("family", ["untied", "tied", "gpt2"])
def test_llama_cpp_has_the_new_tokens(family: str, tmp_path: Path) -> None:
    """A file of the run is examined as any other: ids of text and markup with the new tokens in it, logits, answers.

    The special token is a control token, which llama.cpp does not show, and the others are shown. An adapter alone is
    refused: GGUF has no place for rows in one.
    """
    need("torch")
    for library in ("gguf", "xllamacpp"):
        pytest.importorskip(library, reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    from gguf import GGUFReader

    loaded, place = run_with(tmp_path, family, "torch")
    with without_reload_check():
        run, _ = fine_tune(loaded, output=place)
    asked = {"adapter_only": False, "output": None, "backend": "torch", "tell": lambda words: None}
    written = export(str(run), outtype="f32", **asked)
    stages = {check.stage: check for check in written.checks}
    assert all(check.passed for check in written.checks)
    assert {"token ids", "logits", "greedy text"} <= stages.keys()
    fields = GGUFReader(written.path).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert [tokens[number] for number in IDS] == list(NEW)
    assert [kinds[number] for number in IDS] == [CONTROL, USER_DEFINED, USER_DEFINED]
    with pytest.raises(ModelError, match="--adapter-only"):
        export(str(run), outtype="f32", **{**asked, "adapter_only": True})


def test_a_template_that_needs_control_tokens_gets_them(tmp_path: Path) -> None:
    """ChatML on a model that has none of its tokens: they are added, learned, and end an answer."""
    need("torch")
    from support.gguf_models import CONTROL

    loaded, _ = run_with(tmp_path, "untied", "torch", template__name="llama3")
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert not set(tokens) & set(CONTROL)
    from finetune.training.prepare import prepare

    chosen = loaded.config.tokens.model_copy(update={"add_special_tokens": tuple(tokens), "add_tokens": ()})
    loaded = LoadedConfig(loaded.config.model_copy(update={"tokens": chosen}), loaded.origins)
    with pytest.raises(FineTuneError, match="lacks"):
        prepare(loaded)
    prepared = prepare(with_new_tokens(loaded, tell=lambda words: None))
    assert prepared.encoder.stop_ids[0] == 602
    assert all(row.ids[-1] == 602 and row.trained[-1] for row in prepared.train.rows)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"tokens.add_tokens": [""]}, "add_tokens"),
    "white space": ({"tokens.add_tokens": ["  "]}, "white space"),
    "white space beside": ({"tokens.add_tokens": [" <a>"]}, "white space"),
    "twice": ({"tokens.add_tokens": ["<a>", "<a>"]}, "named twice"),
    "twice in two lists": ({"tokens.add_tokens": ["<a>"], "tokens.add_special_tokens": ["<a>"]}, "named twice"),
    "one in another": ({"tokens.add_tokens": ["<a>", "x<a>"]}, "is part of"),
    "a line": ({"tokens.add_tokens": ["a\nb"]}, "add_tokens"),
    "too long": ({"tokens.add_tokens": ["x" * 129]}, "add_tokens"),
    "too many": ({"tokens.add_tokens": [f"<{number:04d}>" for number in range(1001)]}, "add_tokens"),
    "no list": ({"tokens.add_tokens": "<a>"}, "add_tokens"),
    "a word": ({"tokens.add_tokens": ["a"]}, "word of the model's vocabulary"),
    "in one that is there": ({"tokens.add_tokens": ["im_end"]}, "part of the other"),
    "around one that is there": ({"tokens.add_tokens": ["a</s>"]}, "part of the other"),
    "a kind that cannot": ({"tokens.add_tokens": ["<a>"], "adapter.kind": "ia3"}, "IA3"),
}


@pytest.mark.parametrize("case", BAD)
def test_tokens_that_cannot_be_are_refused(case: str, tmp_path: Path, cache: Path) -> None:
    """Each is named before anything is written."""
    from finetune.config import load_config

    need("torch")
    base = plain_model(tmp_path / "base", "untied")
    changes, told = BAD[case]
    given = {"model.path": str(base.folder), **changes}
    with pytest.raises(ConfigError) as refused:
        with_new_tokens(load_config(None, environ={}, overrides=given, profile=None), tell=lambda words: None)
    assert told in str(refused.value) + repr(refused.value.problems)
    assert not cache.exists()
