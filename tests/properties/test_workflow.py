"""Laws of the whole workflow, from a configuration to a judged run, without any ML framework."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune import train as pipeline
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig
from finetune.errors import ConfigError, FineTuneError, OutOfMemoryError, OutputError, RefusedError, StorageError
from finetune.events import Event, PhaseStarted, StepDone
from finetune.files import describe_file
from finetune.records import Outcome
from finetune.run import folder as run_folder
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder
from finetune.train import fine_tune
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import EOS, KINDS, TokenizerKind
from support.disks import everything_below, full_after
from support.workplace import ADAPTER, Death, make_data, make_model, resume, settings, without_reload_check

OUTCOMES = set(Outcome)


Run = tuple[Path, dict[str, Any], list[Event]]


@pytest.fixture(scope="module")
def judged(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a sham control; its adapter is loaded in a fresh process."""
    heard: list[Event] = []
    output = tmp_path_factory.mktemp("judged") / "run"
    loaded = settings(model, data, judge__control="always", evaluation__questions=11)
    return *fine_tune(loaded, output=output, listener=heard.append, command="ft x"), heard


def test_workflow_goes_through_its_phases_in_order_and_the_manifest_comes_last(judged: Run) -> None:
    """A run prepares, looks, trains, saves, looks again, checks and judges; run.json lists every file as it is."""
    folder, record, heard = judged
    phases = [event.phase for event in heard if isinstance(event, PhaseStarted)]
    assert phases == [
        "prepare",
        "plan",
        "load",
        "observe base",
        "attach",
        "train",
        "save adapter",
        "observe tuned",
        "check adapter",
        "shuffled-label control",
    ]
    written = json.loads((folder / "run.json").read_text())
    assert written == record
    assert (written["command"], written["status"]) == ("ft x", "complete")
    listed = {file["path"]: file for file in written["artifacts"]}
    there = {path for path, content in everything_below(folder).items() if content is not None}
    assert there - {"run.json"} == set(listed)
    assert all(describe_file(folder / name, name=name) == file for name, file in listed.items())
    assert {ADAPTER, "report.html", "report.json", "plan.yaml", "events.jsonl"} <= set(listed)
    newest = max(path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run.json" and path.is_file())
    assert (folder / "run.json").stat().st_mtime_ns >= newest
    assert written["reload"]["difference"] <= 1e-6 * written["reload"]["largest_logit"]
    counts = written["data"]["train"]
    steps = [event for event in RunFolder(folder).read_events() if isinstance(event, StepDone)]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (11, 11, {})
    for name in ("tokens", "trained_tokens"):
        assert sum(getattr(step, name) for step in steps) == 2 * counts[name]
    assert [loss["loss"] for loss in written["losses"]["train"]] == [step.loss for step in steps]


def test_workflow_judges_every_criterion_on_what_was_measured(judged: Run) -> None:
    """Each of the five criteria has its verdicts, each with a measured and an allowed value or a reason."""
    record = judged[1]
    verdicts = record["verdicts"]
    assert {one["criterion"] for one in verdicts} == {1, 2, 3, 4, 5}
    assert all(one["outcome"] in OUTCOMES and one["allowed"] for one in verdicts)
    assert all(one["measured"] or one["reason"] for one in verdicts)
    by_id = {one["id"]: one for one in verdicts}
    assert all(one["outcome"] == "not applicable" for one in verdicts if one["criterion"] == 3)
    assert by_id["artifacts-reload"]["outcome"] == "passed", by_id["artifacts-reload"]
    assert by_id["parameter-updates"]["outcome"] == by_id["parameter-exactly"]["outcome"] == "passed"
    assert record["scores"]["learning"]["control"]["count"] == record["scores"]["learning"]["tuned"]["count"] == 11


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    """A run that nobody stopped, with its number of events; accumulation, dropout and packing are on."""
    heard: list[Event] = []
    output = tmp_path_factory.mktemp("whole") / "run"
    with without_reload_check():
        folder, record = fine_tune(demanding(model, data), output=output, listener=heard.append)
    return folder, record, len(heard)


def demanding(model: Path, data: Path) -> LoadedConfig:
    """A run with everything in it that a resume could forget."""
    changes = {
        "gradient_accumulation_steps": 2,
        "packing": True,
        "save_every": 2,
        "evaluate_every": 3,
        "batch_size": 1,
        "epochs": 3.0,
    }
    return settings(
        model,
        data,
        adapter__dropout=0.3,
        data__valid_fraction=0.2,
        tokens__max_length=64,
        evaluation__questions=2,
        **{f"training__{key}": value for key, value in changes.items()},
    )


@given(st.integers(0, 60_000))
@example(0)
@examples(1 / 4)
def test_workflow_on_a_full_disk_fails_clearly_and_can_go_on(
    model: Path, data: Path, whole: tuple[Path, dict[str, Any], int], size: int
) -> None:
    """A disk that is full at any file is one clear error; with space again the run ends as it would have."""
    folder = whole[0]
    with TemporaryDirectory() as name, without_reload_check():
        output = Path(name) / "run"
        with full_after(size):
            try:
                fine_tune(demanding(model, data), output=output)
                failed = None
            except StorageError as error:
                failed = error
        if failed:
            # The check of packing writes logits into a temporary folder.
            assert str(output) in str(failed) or "logits.safetensors" in str(failed)
            assert failed.hint
            assert not (output / "run.json").exists()
            if (output / "plan.yaml").exists():
                assert f"go on with: ft train --resume --output {output}" in failed.hint
                resume(output)
            else:
                fine_tune(demanding(model, data), output=output)
        assert (output / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()


def _no_answers(place: Path) -> None:
    place.write_text('{"prompt": "a", "completion": ""}\n' * 3)


def _cut_off(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-7])


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str]] = {
    "no such model": ({"model__path": "./nowhere"}, None, "nowhere"),
    "no such data": ({"data__train": "nowhere.jsonl"}, None, "nowhere.jsonl"),
    "rank above a layer": ({"adapter__rank": 500}, None, "rank 500"),
    "no such layer": ({"adapter__target_modules": ["q_prj"]}, None, "q_proj"),
    "too long for the model": ({"tokens__max_length": 999}, None, "999"),
    "a template's control tokens": ({"template__name": "llama3", "model__path": "SMALL"}, None, "<|eot_id|>"),
    "no row fits": ({"tokens__max_length": 8}, None, "longer than 8 tokens"),
    "rows too long and refused": ({"tokens__max_length": 20, "tokens__truncation": "refuse"}, None, "rows.jsonl:"),
    "two kinds of held-out rows": ({"data__valid": "DATA", "data__valid_fraction": 0.5}, None, "valid_fraction"),
    "no template of its own": ({"template__name": "tokenizer"}, None, "chat template"),
    "no answer in any row": ({}, _no_answers, "empty answer"),
    "a broken line": ({}, _cut_off, "rows.jsonl:11"),
    "no such framework": ({"backend": "mlx"}, None, "mlx"),
    "nothing held out to stop by": ({"training__early_stopping_patience": 3}, None, "training.early_stopping_patience"),
    "nothing held out to choose by": (
        {"training__load_best_model": True, "data__valid_fraction": 0.0},
        None,
        "training.load_best_model",
    ),
    "no held-out row fits": (
        {"training__load_best_model": True, "tokens__max_length": 40, "data__valid": "LONG"},
        None,
        "training.load_best_model",
    ),
    "a margin for nothing": (
        {"training__early_stopping_min_delta": 0.5, "data__valid_fraction": 0.3},
        None,
        "early_stopping_patience is not",
    ),
    "no such tracker here": ({"tracking__to": ["wandb", "mlflow"]}, None, "finetune-suite[wandb,mlflow]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_workflow_refused_leaves_nothing_behind(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot work is refused before work begins, with the value and a remedy; the disk is as it was."""
    changes, damage, named = REFUSED[case]
    for room in ("abilities", "tracking.tracker"):  # neither a framework nor a tracker, whatever is here
        monkeypatch.setattr(f"finetune.{room}.find_spec", lambda library: None)
    place = make_data(tmp_path / "rows.jsonl", 11)
    if damage:
        damage(place)
    small = make_model(tmp_path / "small", kind=next(kind for kind in KINDS if not kind.llama3))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 60, "completion": "1"}) + "\n")
    places = {"DATA": str(place), "SMALL": str(small), "LONG": str(tmp_path / "long.jsonl")}
    before = everything_below(tmp_path)
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises((RefusedError, ConfigError, FineTuneError)) as caught:
        fine_tune(settings(model, place, **changes), output=tmp_path / "run")
    assert named in str(caught.value)
    assert caught.value.exit_code in (2, 3)
    assert "hint" in str(caught.value)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_workflow_overtaken_by_another_process_leaves_its_run_alone(
    resume: bool, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process makes or finishes the run in the same folder while this one gets ready, it is refused."""
    folder, loaded = tmp_path / "run", settings(model, data)

    def stop(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Death

    if resume:
        with pytest.raises(Death):
            fine_tune(loaded, output=folder, listener=stop)
    owner, done = pipeline.run_owner, []

    def overtaken(*given: Any) -> Any:
        monkeypatch.setattr(pipeline, "run_owner", owner)
        with without_reload_check():
            fine_tune(loaded, output=folder, resume=resume)
        done.append(everything_below(folder))
        return owner(*given)

    monkeypatch.setattr(pipeline, "run_owner", overtaken)
    with pytest.raises(OutputError, match="is finished" if resume else "not empty"):
        fine_tune(loaded, output=folder, resume=resume)
    assert [everything_below(folder)] == done


def test_workflow_out_of_memory_tells_the_estimate_and_what_would_fit(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out, a run ends with what was estimated, what is left of it, and settings expected to fit."""

    def fail(*given: Any) -> Any:
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr("finetune.backends.reference.session.ReferenceSession.update", fail)
    loaded = settings(model, data, training__batch_size=4)
    with pytest.raises(OutOfMemoryError, match="1 TiB; no checkpoint had been written yet; the estimate") as ended:
        fine_tune(loaded, output=tmp_path / "run")
    told = re.search(r"for 3 x \d+ tokens at once was ([\d.]+) MiB, at most [\d.]+ MiB", ended.value.message)
    assert told is not None
    assert "training.batch_size (and" in ended.value.hint
    monkeypatch.setattr("finetune.training.out_of_memory._within_reach", lambda: int((float(told[1]) - 0.3) * 1024**2))
    with pytest.raises(OutOfMemoryError) as ended:
        fine_tune(loaded, output=tmp_path / "other")
    assert re.search(r"--set training.batch_size=[12] --set training.gradient_accumulation_steps=", ended.value.hint)


def test_workflow_has_its_log_on_disk_before_each_checkpoint(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a checkpoint is written, every event before it is on disk: a power cut leaves no gap."""
    secured, saved = [0], []
    flush, save = run_folder.flush, CheckpointStore.save

    def flushed(path: Path) -> None:
        secured.append(path.stat().st_size)
        flush(path)

    def keep(self: CheckpointStore, *given: Any, **named: Any) -> Path:
        saved.append((tmp_path / "run" / "events.jsonl").stat().st_size - secured[-1])
        return save(self, *given, **named)

    monkeypatch.setattr(run_folder, "flush", flushed)
    monkeypatch.setattr(CheckpointStore, "save", keep)
    with without_reload_check():
        fine_tune(settings(model, data, training__save_every=2), output=tmp_path / "run")
    assert len(saved) > 1
    assert set(saved) == {0}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.chatml and kind.llama3], ids=str)
@pytest.mark.parametrize("template", ["alpaca", "llama3"])
def test_workflow_saves_the_tokenizer_and_where_to_stop(template: str, kind: TokenizerKind, tmp_path: Path) -> None:
    """The tokenizer beside the adapter is the base's, and where to stop holds the token that ends an answer."""
    base = make_model(tmp_path / "model", kind=kind)
    changes = {"template__name": template, "training__max_steps": 1, "evaluation__questions": 0}
    with without_reload_check():
        loaded = settings(base, make_data(tmp_path / "rows.jsonl", 4), **changes)
        adapter = fine_tune(loaded, output=tmp_path / "run")[0] / "adapter"
    before, after = FileTokenizer(base), FileTokenizer(adapter)
    assert after.identity() == before.identity()
    assert (after.bos, after.eos) == (before.bos, before.eos)
    said = json.loads((adapter / "generation_config.json").read_text())
    names = [kind.control_tokens[token] for token in said["eos_token_id"]]
    assert names[0] == {"alpaca": EOS, "llama3": "<|eot_id|>"}[template]
    assert EOS in names
    assert said["pad_token_id"] == before.pad_id
    assert said.get("bos_token_id") == before.bos_id
