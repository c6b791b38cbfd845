"""Laws of whole runs on quantised bases: what was trained on is told, and found again to go on, score and talk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import train as pipeline
from finetune.backends import open_backend
from finetune.config import load_config
from finetune.errors import ConfigError, ModelError, RefusedError
from finetune.events import CheckpointSaved, Event
from finetune.evidence.reopen import compare, reopen
from finetune.evidence.talk import talker
from finetune.records import ModelLocation, Quantization
from finetune_strategies.tokenizers import KINDS, tokenizer_folder
from scenarios.test_mlx_quantized import convert
from support.sessions import Bench
from support.workplace import LLAMA, QUICK, Death, make_data, resume

pytestmark = pytest.mark.tier2
WIDE = {"hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ON_LOAD: dict[str, Any] = {"model.quantize": "4bit", "model.quantize_group_size": 32}
HOW = Quantization(4, 32)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with a tokenizer, in full and as mlx-lm quantises it, and data."""
    folder = tmp_path_factory.mktemp("quantised")
    for name in ("full", "packed"):
        shutil.copytree(tokenizer_folder(KINDS[0]), folder / name)
    words = json.loads((folder / "full" / "config.json").read_text())["vocab_size"]
    open_backend("reference").create({**LLAMA, **WIDE, "vocab_size": words}, folder / "full", 3)
    convert(Bench("mlx", ModelLocation("full", folder / "full", "local")), folder / "packed")
    return {"data": make_data(folder / "rows.jsonl", 6), "full": folder / "full", "packed": folder / "packed"}


def run(places: dict[str, Path], output: Path, model: str, settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    """A short run on one of the models; returns what its run.json says."""
    overrides = {
        **QUICK,
        "backend": "mlx",
        "model.path": str(places[model]),
        "data.train": str(places["data"]),
        "training.max_steps": 4,
        "training.save_every": 2,
        "adapter.dropout": 0.2,
        "adapter.kind": "dora",
        "judge.memory": "always",
        **settings,
    }
    loaded = load_config(None, environ={}, overrides=overrides, profile=None)
    return pipeline.fine_tune(loaded, output=output, **how)[1]


def weights(output: Path) -> bytes:
    """The adapter that a run has left."""
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on the full model, quantised as it is loaded."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(places, output, "full", ON_LOAD)


def test_run_says_what_it_was_trained_on(whole: tuple[Path, dict[str, Any]], places: dict[str, Path]) -> None:
    """The manifest tells how the base was quantised, what stays in full, and what is not measured and why."""
    _, record = whole
    assert record["model"]["quantization"] == {
        "where": "load",
        "how": "4 bits in groups of 32",
        "quantized": 8,
        "in_full": ["model.layers.0.self_attn.o_proj"],
        "weight_bytes": open_weight(places["full"]),
    }
    assert record["model"]["parameters"] > 64 * 96 * 3
    [note] = [note for note in record["notes"] if "quantised" in note]
    assert "8 matrices, 4 bits in groups of 32" in note
    assert "1 matrices stay in full: model.layers.0.self_attn.o_proj" in note
    assert "it cannot be fully fine-tuned" in record["not_measured"]["memory"]
    memory = {verdict["outcome"] for verdict in record["verdicts"] if "memory" in verdict["id"]}
    assert memory == {"not applicable"}
    assert record["reload"]["difference"] <= record["reload"]["allowed"] < record["reload"]["difference_from_base"]


def open_weight(folder: Path) -> int:
    """What the weights of the model take once they are loaded, in bytes."""
    from finetune.backends.mlx.probe import weight_bytes

    return weight_bytes(Bench("mlx", ModelLocation("full", folder, "local")).open(quantize=HOW))


def test_run_on_a_base_quantised_beforehand_is_the_same_run(
    whole: tuple[Path, dict[str, Any]], places: dict[str, Path], tmp_path: Path
) -> None:
    """Quantised before or as it is loaded, one base gives one adapter, to the byte; other bits give another."""
    output, record = whole
    other = run(places, tmp_path / "packed", "packed", {})
    assert weights(tmp_path / "packed") == weights(output)
    assert other["model"]["quantization"] == {**record["model"]["quantization"], "where": "files"}
    assert other["model"]["parameters"] == record["model"]["parameters"]
    assert other["losses"] == record["losses"]
    for name, settings in {"8bit": {**ON_LOAD, "model.quantize": "8bit"}, "in full": {"judge.memory": "never"}}.items():
        changed = run(places, tmp_path / name, "full", settings)
        assert changed["losses"] != record["losses"]
        assert weights(tmp_path / name) != weights(output)


def test_run_opened_again_is_on_the_same_base(whole: tuple[Path, dict[str, Any]], places: dict[str, Path]) -> None:
    """Scored again, base and tuned model have the losses that the run has told; it is talked to on the same base."""
    output, record = whole
    prepared, session = reopen(output)
    base, tuned = compare(session=session, prepared=prepared)
    told = [look["loss"] for look in record["losses"]["fixed"]]
    assert [base.fixed[0], tuned.fixed[0]] == pytest.approx([told[0], told[-1]], rel=1e-6)
    plain = Bench("mlx", ModelLocation("full", places["full"], "local")).open(quantize=HOW).fingerprints()
    kept = [mark for name, mark in session.fingerprints().items() if ".lora_" not in name]
    assert sorted(kept) == sorted(plain.values())
    [question] = prepared.conversations[:1]
    answer = talker(output, max_new_tokens=4)(question.prompt).text
    ids = session.generate([prepared.encoder.prompt_ids(question.prompt)], 4, prepared.encoder.stop_ids)[0]
    assert answer == prepared.encoder.tokenizer.decode(ids).strip()


def test_run_killed_and_resumed_is_the_run_that_was_not(
    whole: tuple[Path, dict[str, Any]], places: dict[str, Path], tmp_path: Path
) -> None:
    """Going on loads the base quantised as it was, to the same byte; a base in other bits is refused."""
    output, record = whole

    def dies(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            raise Death

    with pytest.raises(Death):
        run(places, tmp_path / "run", "full", ON_LOAD, listener=dies)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    plan = tmp_path / "other" / "plan.yaml"
    assert plan.read_text().count("quantize: 4bit") == 1
    assert yaml.safe_load(plan.read_text())["model"]["quantize_group_size"] == 32
    plan.write_text(plan.read_text().replace("quantize: 4bit", "quantize: 8bit"))
    with pytest.raises(RefusedError, match=r"model\.quantize"):
        resume(tmp_path / "other")
    resumed = resume(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(output)
    assert [step["loss"] for step in resumed["losses"]["train"]] == [step["loss"] for step in record["losses"]["train"]]


@pytest.mark.parametrize(
    ("model", "settings", "kind", "words"),
    [
        ("packed", {"backend": "reference"}, ModelError, "full weights only"),
        ("packed", ON_LOAD, ModelError, "quantised already"),
        ("packed", {"adapter.modules_to_save": ["lm_head"]}, ModelError, "quantised: it cannot be trained whole"),
        ("packed", {"adapter.kind": "full"}, ModelError, "adapter.kind is full"),
        ("full", {**ON_LOAD, "adapter.modules_to_save": ["lm_head"]}, ModelError, "cannot be trained whole"),
        ("full", {**ON_LOAD, "backend": "reference"}, ConfigError, "model.quantize"),
    ],
)
def test_run_that_cannot_be_is_refused_before_anything_is_written(
    places: dict[str, Path], model: str, settings: dict[str, Any], kind: Any, words: str, tmp_path: Path
) -> None:
    """What a quantised base cannot be trained with is refused with a way out, and no folder is made."""
    with pytest.raises(kind, match=words) as caught:
        run(places, tmp_path / "run", model, settings)
    assert "hint" in str(caught.value)
    assert caught.value.exit_code == (2 if kind is ConfigError else 3)
    assert not (tmp_path / "run").exists()
