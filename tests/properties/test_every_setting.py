"""Every setting, when it is changed, changes what a whole run does; none is a dead knob."""

import json
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune.abilities import Abilities
from finetune.chat.catalog import CHATML
from finetune.cli.console import exit_code
from finetune.config import KEYS, json_schema, load_config
from finetune.errors import FineTuneError
from finetune.evidence import extra_runs
from finetune.records import Outcome
from finetune.train import fine_tune
from finetune_strategies.tokenizers import KINDS
from support.trackers import SilentTracker
from support.workplace import QUICK, make_data, make_model, without_reload_check

_FILES = ("MODEL", "OTHER", "TRAIN", "VALID", "KNOWN", "ASKED")
BASE: dict[str, Any] = {
    **QUICK,
    "model.path": "MODEL",
    "data.train": "TRAIN",
    "data.valid": "VALID",
    "data.rehearsal": "KNOWN",
    "data.retention": "ASKED",
    "evaluation.questions": 2,
    "evaluation.max_new_tokens": 2,
}


@dataclass(frozen=True)
class Change:
    """Another value for a setting, and what else must be so that it can matter; `None` leaves a setting out.

    `refused` is what the refusal says where this backend, model or single process cannot have the value: only there
    does a refusal show that the setting is read.
    """

    value: Any
    given: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


RISING: dict[str, Any] = {"training.evaluate_every": 1, "training.learning_rate": 1.0, "training.epochs": 3.0}
"""So fast that the held-out loss rises after its lowest."""

PAIRED: dict[str, Any] = {
    "training.objective": "dpo",
    "data.train": "PAIRS.jsonl",
    "data.valid": "PAIRS.jsonl",
    "data.rehearsal": None,
    "data.columns": {"prompt": "prompt", "chosen": "completion", "rejected": "rejected"},
}
CHANGES: dict[str, Change] = {
    "model.path": Change("OTHER"),
    "model.revision": Change("main", refused="has no revisions"),
    "model.adapter": Change("nowhere", refused="there is no adapter and no run at nowhere"),
    "model.dtype": Change("bfloat16", refused="cannot imitate bfloat16"),
    "model.device": Change("gpu", refused="model.device is gpu"),
    "model.quantize": Change("4bit", refused="quantize is 4bit"),
    "model.quantize_group_size": Change(32, refused="quantize_group_size is 32"),
    "data.train": Change("KNOWN"),
    "data.mix": Change([1.0, 1.0], {"data.train": ["TRAIN", "KNOWN"]}),
    "data.valid": Change("KNOWN"),
    "data.valid_fraction": Change(0.5, {"data.valid": None}),
    "data.rehearsal": Change("VALID"),
    "data.retention": Change("VALID"),
    "data.limit": Change(4),
    "data.columns": Change({"text": "prompt"}),
    "data.ignore_columns": Change(["completion"], refused="without 'completion'"),
    "template.name": Change("alpaca"),
    "template.date": Change("2025-01-02", {"template.name": "DATED.jinja"}),
    "template.train_on": Change("last", {"data.train": "TURNS.jsonl"}),
    "template.variables": Change({"greeting": "Hi"}, {"template.name": "DATED.jinja"}),
    "tokens.max_length": Change(40),
    "tokens.truncation": Change("truncate_prompt", {"tokens.max_length": 40}),
    "tokens.cache": Change("CACHE"),
    "tokens.add_special_tokens": Change(["[CALL]"]),
    "tokens.add_tokens": Change(["[CALL]"]),
    "adapter.kind": Change("dora"),
    "adapter.rank": Change(3),
    "adapter.alpha": Change(5.0),
    "adapter.scaling": Change("rank_stabilized"),
    "adapter.dropout": Change(0.5),
    "adapter.target_modules": Change(["q_proj"]),
    "adapter.rank_pattern": Change({"q_proj": 1}),
    "adapter.alpha_pattern": Change({"q_proj": 3.0}),
    "adapter.modules_to_save": Change(["model.norm"]),
    "training.objective": Change("dpo", {"data.rehearsal": None}, "no column is the chosen answer"),
    "training.dpo_beta": Change(0.5, PAIRED),
    "training.epochs": Change(1.0),
    "training.max_steps": Change(2),
    "training.batch_size": Change(2),
    "training.processes": Change(2, refused="processes is 2"),
    "training.gradient_accumulation_steps": Change(2),
    "training.gradient_checkpointing": Change(True, refused="keeps all that it computes"),
    "training.packing": Change(True),
    "training.learning_rate": Change(0.02),
    "training.schedule": Change("linear"),
    "training.warmup_fraction": Change(0.5),
    "training.loraplus_lr_ratio": Change(4.0),
    "training.weight_decay": Change(0.5),
    "training.label_smoothing": Change(0.3),
    "training.max_grad_norm": Change(0.01),
    "training.seed": Change(1),
    "training.save_every": Change(3),
    "training.evaluate_every": Change(3),
    "training.early_stopping_patience": Change(1, RISING),
    "training.early_stopping_min_delta": Change(
        9.0, {"training.early_stopping_patience": 2, "training.evaluate_every": 1}
    ),
    "training.load_best_model": Change(True, RISING),
    "evaluation.questions": Change(1),
    "evaluation.retention_questions": Change(2),
    "evaluation.max_new_tokens": Change(5),
    "judge.answers": Change("open"),
    "judge.goal": Change("generalise", {"judge.answers": "open"}),
    "judge.budget": Change(1e-9, {"judge.control": "auto"}),
    "judge.control": Change("always"),
    "judge.memory": Change("auto"),
    "judge.memory_batch_size": Change(3, {"judge.memory": "always"}),
    "judge.memory_length": Change(32, {"judge.memory": "always"}),
    "judge.allow_inconclusive": Change(True),
    "tracking.to": Change(["tensorboard"]),
    "tracking.project": Change("another", {"tracking.to": ["tensorboard"]}),
    "tracking.name": Change("another", {"tracking.to": ["tensorboard"]}),
    "backend": Change("mlx", refused="" if find_spec("mlx_lm") else "is not installed"),
}
_ALWAYS_NEW = (
    "id",
    "started",
    "command",
    "plan",
    "notes",
    "advice",
    "timing",
    "throughput",
    "peak_rss_bytes",
    "machine",
)
"""What differs from run to run, or repeats the settings themselves: no proof that a setting does anything."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tiny models and three small data sets."""
    folder = tmp_path_factory.mktemp("knobs")
    for number, name in enumerate(("MODEL", "OTHER")):
        make_model(folder / name, kind=KINDS[number], seed=number)
    for name, count in (("TRAIN", 5), ("VALID", 2), ("KNOWN", 3), ("ASKED", 3)):
        make_data(folder / f"{name}.jsonl", count)
    turns = folder / "turns.jsonl"
    said = [{"role": role, "content": "a b"} for role in ("user", "assistant") * 2]
    turns.write_text("".join(json.dumps({"messages": said[: 2 * (1 + row % 2)]}) + "\n" for row in range(5)))
    pairs = folder / "pairs.jsonl"
    paired = [{"prompt": "a b", "completion": "a " * row, "rejected": "b"} for row in range(1, 6)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in paired))
    dated = folder / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}{{ greeting }}" + CHATML.jinja)
    return {name: str(next(folder.glob(f"{name}*"))) for name in _FILES} | {
        "CACHE": str(folder / "CACHE"),
        "DATED.jinja": str(dated),
        "TURNS.jsonl": str(turns),
        "PAIRS.jsonl": str(pairs),
    }


def outcome(settings: dict[str, Any], places: dict[str, str], output: Path) -> Any:
    """Everything a run did that can be seen from outside, or the words of its refusal."""
    chosen = {
        key: [places.get(each, each) for each in value]
        if isinstance(value, list) and key.startswith("data.")
        else places.get(value, value)
        if isinstance(value, str)
        else value
        for key, value in settings.items()
        if value is not None
    }
    try:
        with without_reload_check():
            loaded = load_config(None, environ={}, overrides=chosen, profile=None)
            folder, record = fine_tune(loaded, output=output)
    except FineTuneError as error:
        return str(error).replace(str(output), "")
    cache = Path(places["CACHE"])
    kept = sorted(path.name for path in cache.iterdir()) if cache.exists() else []
    shutil.rmtree(cache, ignore_errors=True)
    record = {key: value for key, value in record.items() if key not in _ALWAYS_NEW}
    weights = next(item["sha256"] for item in record["artifacts"] if item["path"].endswith("adapter_model.safetensors"))
    record["artifacts"] = [weights, sorted(path.name for path in folder.glob("checkpoints/*")), kept]
    allowed = loaded.config.judge.allow_inconclusive
    record["exit code"] = exit_code(Outcome.INCONCLUSIVE, allow_inconclusive=allowed)  # were it inconclusive
    return json.loads(json.dumps(record))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What a memory measurement was asked for; the reference backend itself has no means to measure."""
    found: list[Any] = []

    def note(*request: Any, **sizes: Any) -> Any:
        found.append((request[0], sizes))
        raise extra_runs.EvidenceError("not here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("finetune.tracking.tracker.find_spec", lambda name: name)
    monkeypatch.setattr(
        "finetune.tracking.consumer.open_tracker",
        lambda name, tracked: found.append((name, tracked.project, tracked.name)) or SilentTracker(),
    )
    monkeypatch.setattr(extra_runs, "measure_memory", note)
    # Nothing is free: what the training allows is all that judging has.
    monkeypatch.setattr("finetune.evidence.budget.FREE", 0.0)
    monkeypatch.setattr("finetune.evidence.budget._PROCESS", 0.0)
    monkeypatch.setattr("finetune.backends.reference.backend.ReferenceBackend.abilities", Abilities(memory=True))
    return found


def test_every_setting_is_in_the_table_and_the_schema() -> None:
    """The table below has every setting of the JSON Schema, no other, and a value that is not the one used anyway."""
    schema = json_schema()
    listed = {name for name in schema["properties"] if name not in schema.get("$defs", {})}
    assert set(CHANGES) == set(KEYS)
    assert {key.split(".")[0] for key in CHANGES} <= listed
    assert len(CHANGES) >= 55
    assert all(change.value != {**BASE, **change.given}.get(key) for key, change in CHANGES.items())


@pytest.fixture(scope="module")
def repeated(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What runs without the change did, by what else they were given; each is made once."""
    return {}


@pytest.mark.parametrize("key", KEYS)
def test_setting_changed_changes_the_run(
    key: str, places: dict[str, str], repeated: dict[str, Any], asked: list[Any], tmp_path: Path
) -> None:
    """With this one setting changed, a run trains, writes or asks differently from the same run without it."""
    change = CHANGES[key]
    given = {**BASE, **change.given}
    name = json.dumps(change.given)
    if name not in repeated:
        repeated[name] = [outcome(given, places, tmp_path / "before"), list(asked)]
        asked.clear()
    before = repeated[name]
    after = [outcome({**given, key: change.value}, places, tmp_path / "after"), list(asked)]
    assert after != before
    refusal = after[0] if isinstance(after[0], str) else ""
    assert bool(refusal) == bool(change.refused), refusal
    assert change.refused in refusal


def test_nothing_changed_changes_nothing(places: dict[str, str], asked: list[Any], tmp_path: Path) -> None:
    """Two runs with the same settings do the same in everything that the law above looks at."""
    first, second = (outcome(BASE, places, tmp_path / name) for name in ("first", "second"))
    assert isinstance(first, dict)
    assert first == second
    assert asked == []
