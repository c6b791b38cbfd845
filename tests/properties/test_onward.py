"""Laws of going on from an adapter: base and shape are found, what contradicts them is refused, and it is told."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from finetune.chat.catalog import CHATML
from finetune.cli.app import run as ft
from finetune.config import LoadedConfig, load_config, load_plan
from finetune.errors import ConfigError, FineTuneError, ModelError, RefusedError
from finetune.events import CheckpointSaved, Event
from finetune.evidence.reopen import compare, reopen
from finetune.train import fine_tune
from support.disks import everything_below
from support.workplace import (
    ADAPTER,
    QUICK,
    Death,
    ended,
    make_data,
    make_model,
    resume,
    settings,
    without_reload_check,
)

SHAPE = {"adapter.kind": "lora", "adapter.rank": 3, "adapter.alpha": 5.0, "adapter.scaling": "rank_stabilized"}
OWN = ("adapter.rank", "template.name")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two sets of rows, and a run on the first."""
    place = tmp_path_factory.mktemp("onward")
    make_model(place / "model")
    make_data(place / "rows.jsonl", 7)
    make_data(place / "more.jsonl", 8)
    shape = {key.replace(".", "__"): value for key, value in SHAPE.items()}
    loaded = settings(place / "model", place / "rows.jsonl", adapter__target_modules=["v_proj", "q_proj"], **shape)
    with without_reload_check():
        fine_tune(loaded, output=place / "first")
    return place


def asked(place: Path, start: Path, **changes: Any) -> LoadedConfig:
    """Settings that go on from an adapter on other rows, and say nothing of its shape."""
    chosen = {key: value for key, value in QUICK.items() if key not in OWN}
    chosen |= {key.replace("__", "."): value for key, value in changes.items()}
    overrides = {**chosen, "model.path": str(start), "data.train": str(place / "more.jsonl")}
    return load_config(None, environ={}, overrides=overrides, profile=None)


def go_on(place: Path, start: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run that goes on from an adapter; what run.json then holds."""
    with without_reload_check():
        return fine_tune(asked(place, start, **changes), output=output)[1]


def as_peft(place: Path, folder: Path, **changes: Any) -> Path:
    """The adapter alone, as PEFT would leave it: no tokenizer, no template, and no run around it."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "first" / "adapter" / name, folder / name)
    told = json.loads((folder / "adapter_config.json").read_text())
    told |= {"base_model_name_or_path": str(place / "model")} | changes
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def as_mlx(place: Path, folder: Path) -> Path:
    """The adapter in mlx-lm's own format."""
    folder.mkdir()
    tensors = load_file(place / "first" / ADAPTER)
    renamed = {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): (
            tensor.T.copy()
        )
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "adapters.safetensors")
    told = {
        "model": str(place / "model"),
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 3, "scale": 5 / 3**0.5},
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


STARTS: dict[str, Callable[[Path, Path], Path]] = {
    "run": lambda place, folder: place / "first",
    "its adapter": lambda place, folder: place / "first" / "adapter",
    "peft": lambda place, folder: as_peft(place, folder / "tuned"),
    "mlx-lm": lambda place, folder: as_mlx(place, folder / "tuned"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_going_on_takes_base_shape_and_weights_from_the_adapter(place: Path, tmp_path: Path, kind: str) -> None:
    """From a run, its adapter, PEFT's or mlx-lm's folder: its base, its shape and, at first, its loss."""
    start = STARTS[kind](place, tmp_path)
    own = {} if "run" in kind or "its" in kind else {"template__name": "chatml"}
    found = go_on(place, start, tmp_path / "onward", **own)
    plan = load_plan(tmp_path / "onward" / "plan.yaml")
    assert plan.config.model.path == str(place / "model")
    assert plan.config.template.name == "chatml"
    adapter = plan.config.adapter
    assert (adapter.kind, adapter.rank) == ("lora", 3)
    assert set(adapter.target_modules) == {"q_proj", "v_proj"}
    assert plan.origins["adapter.rank"] == "derived"
    told = found["continues"]
    assert told["name"] == ("first" if kind in ("run", "its adapter") else "tuned")
    assert str(tmp_path) not in json.dumps(told)
    assert str(place) not in json.dumps(told)
    # Measured by other means: the first run's model on the rows of the second.
    prepared, _ = reopen(tmp_path / "onward")
    session = _tuned(place)
    fixed, tokens = told["fixed"]
    rows = prepared.train.rows
    from finetune.evidence.open_answers import row_losses

    losses = row_losses(session, rows)
    mean = sum(loss * row.target_count for loss, row in zip(losses, rows, strict=True)) / tokens
    assert fixed == pytest.approx(mean, rel=1e-6)
    assert abs(fixed - found["losses"]["fixed"][0]["loss"]) > 1e-3  # which is the base's
    [note] = [note for note in found["notes"] if "went on from" in note]
    assert "fresh optimizer" in note
    outcomes = {each["id"]: each for each in found["verdicts"]}
    assert outcomes["parameter-first-step"]["outcome"] == "not applicable"
    assert "went on from" in outcomes["parameter-first-step"]["reason"]
    assert "went on from" in outcomes["loss-convergence"]["reason"]


def _tuned(place: Path) -> Any:
    return reopen(place / "first")[1]


def test_going_on_is_one_adapter_on_the_base_of_the_first(place: Path, tmp_path: Path) -> None:
    """What is saved works on the first base alone, without the adapter that it went on from, which may be gone."""
    start = as_peft(place, tmp_path / "tuned")
    found = go_on(place, start, tmp_path / "onward", template__name="chatml")
    shutil.rmtree(start)
    base, tuned = compare(*reopen(tmp_path / "onward"))
    losses = found["losses"]["fixed"]
    assert [base.fixed[0], tuned.fixed[0]] == pytest.approx([losses[0]["loss"], losses[-1]["loss"]], rel=1e-6)
    assert found["model"]["name"] == str(place / "model")


def test_run_that_went_on_resumes_to_the_same_bytes_and_refuses_another_start(place: Path, tmp_path: Path) -> None:
    """Killed and resumed it ends as if it had not been; with other weights to go on from it is refused."""

    def die(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            raise Death

    start = as_peft(place, tmp_path / "tuned")
    how = {"training__save_every": 2, "adapter__dropout": 0.2, "template__name": "chatml"}
    loaded = asked(place, start, **how)
    with without_reload_check():
        with contextlib.suppress(Death):
            fine_tune(loaded, output=tmp_path / "killed", listener=die)
        shutil.copytree(tmp_path / "killed", tmp_path / "again")
        fine_tune(loaded, output=tmp_path / "whole")
        resume(tmp_path / "killed")
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert load_plan(tmp_path / "whole" / "plan.yaml").config.adapter.dropout == 0.2
    assert ended(tmp_path / "killed")["continues"] == ended(tmp_path / "whole")["continues"]
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, start / "adapter_model.safetensors")
    with pytest.raises(RefusedError, match="the adapter to go on from"):
        resume(tmp_path / "again")


def test_everything_that_contradicts_the_adapter_is_refused_by_name(place: Path) -> None:
    """Kind, rank, alpha, scaling, layers: each setting that says otherwise is named with both values, all at once."""
    changes = {
        "adapter__rank": 4,
        "adapter__alpha": 6.0,
        "adapter__target_modules": ["q_proj"],
        "tokens__add_tokens": ["<x>"],
    }
    with pytest.raises(ConfigError) as caught:
        fine_tune(asked(place, place / "first", **changes))
    said = str(caught.value)
    for words in ("rank is 4, but", "has 3", "alpha is 6.0", "target_modules is q_proj", "add_tokens is <x>"):
        assert words in said
    with pytest.raises(ConfigError, match="kind is full, but"):
        fine_tune(asked(place, place / "first", adapter__kind="full"))
    # What says the same is no contradiction.
    fine = asked(place, place / "first", adapter__rank=3, adapter__target_modules=["q_proj", "v_proj"])
    from finetune.evidence.starting import with_start

    assert with_start(fine).config.adapter.rank == 3


def _no_weights(place: Path, folder: Path) -> Path:
    (as_peft(place, folder) / "adapter_model.safetensors").unlink()
    return folder


def _pickled(place: Path, folder: Path) -> Path:
    (_no_weights(place, folder) / "adapter_model.bin").write_bytes(b"x")
    return folder


def _unfinished(place: Path, folder: Path) -> Path:
    shutil.copytree(place / "first", folder)
    (folder / "run.json").unlink()
    return folder


def _changed(place: Path, folder: Path) -> Path:
    shutil.copytree(place / "first", folder)
    tensors = load_file(folder / ADAPTER)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / ADAPTER)
    return folder


def _whole(place: Path, folder: Path) -> Path:
    with without_reload_check():
        full = settings(place / "model", place / "rows.jsonl", adapter__kind="full", adapter__rank=8)
        fine_tune(full, output=folder)
    return folder


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no weights": (_no_weights, "has no adapter_model.safetensors"),
    "pickled": (_pickled, "could run code"),
    "unfinished run": (_unfinished, "--resume"),
    "changed adapter": (_changed, "is not the one that was trained"),
    "whole model": (_whole, "trained the whole model"),
    "no base": (lambda place, folder: as_peft(place, folder, base_model_name_or_path=None), "names no base model"),
    "base gone": (
        lambda place, folder: as_peft(place, folder, base_model_name_or_path="/gone"),
        "--set model.adapter=",
    ),
    "another kind": (lambda place, folder: as_peft(place, folder, peft_type="LOHA"), "merge it into its base"),
    "a pattern of others": (lambda place, folder: as_peft(place, folder, target_modules="query"), "fits none"),
    "a pattern without end": (lambda place, folder: as_peft(place, folder, target_modules="(a+)+b"), "too many ways"),
    "a pattern of some": (lambda place, folder: as_peft(place, folder, target_modules=".*q_proj"), "does not fit"),
    "other layers": (lambda place, folder: as_peft(place, folder, target_modules=["query"]), "has none of it"),
    "other rank": (lambda place, folder: as_peft(place, folder, r=2), "does not fit this model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapter_that_cannot_be_trained_on_is_refused(
    place: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one clear error with exit code 2 or 3 and a way on; no run is left behind, and the adapter stays."""
    make, words = REFUSED[what]
    start = make(place, tmp_path / "tuned")
    before = everything_below(start)
    capsys.readouterr()
    sets = [f"--set={key}={value}" for key, value in QUICK.items() if key not in (*OWN, "backend")]
    command = ["train", "--model", str(start), "--data", str(place / "more.jsonl"), "--backend", "reference", *sets]
    assert ft([*command, "--output", str(tmp_path / "onward")]) in (2, 3)
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "onward").exists()
    assert everything_below(start) == before


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r"model\.layers\.\d+\.self_attn\.(?:q_proj|v_proj)"])
def test_pattern_names_the_layers_that_it_fits(place: Path, tmp_path: Path, pattern: str) -> None:
    """An adapter whose layers are named by a pattern is the same as with a list of them: so are runs that go on."""
    [named, told] = [as_peft(place, tmp_path / "named"), as_peft(place, tmp_path / "told", target_modules=pattern)]
    runs = [tmp_path / "onward of the list", tmp_path / "onward of the pattern"]
    for start, run in zip((named, told), runs, strict=True):
        go_on(place, start, run)
    assert (runs[0] / ADAPTER).read_bytes() == (runs[1] / ADAPTER).read_bytes()


def test_base_of_an_adapter_is_found_again_or_named(place: Path, tmp_path: Path) -> None:
    """Where its base has moved, an adapter's base is named with `--model`, and a run's must be the one it had."""
    start = as_peft(place, tmp_path / "tuned", base_model_name_or_path="/gone")
    found = go_on(place, place / "model", tmp_path / "onward", model__adapter=str(start), template__name="chatml")
    assert found["continues"]["name"] == "tuned"
    make_model(tmp_path / "other", seed=3)
    with pytest.raises(ModelError, match=r"is not the one that .* was trained on"):
        go_on(place, tmp_path / "other", tmp_path / "no", model__adapter=str(place / "first"))


def test_template_beside_an_adapter_is_taken_where_none_is_set(place: Path, tmp_path: Path) -> None:
    """An adapter's folder with a chat template is trained on with it; one that the user names counts before it."""
    start = as_peft(place, tmp_path / "tuned")
    (start / "chat_template.jinja").write_text(CHATML.jinja + "{# own #}")
    go_on(place, start, tmp_path / "onward")
    assert (tmp_path / "onward" / "adapter" / "chat_template.jinja").read_text() == CHATML.jinja + "{# own #}"
    go_on(place, start, tmp_path / "named", template__name="alpaca")
    assert load_plan(tmp_path / "named" / "plan.yaml").config.template.name == "alpaca"


def test_control_of_a_run_that_went_on_begins_with_a_fresh_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict compares with the base, and so does its control: nothing that was learned before is in it."""
    from finetune.training.start import Start

    calls: list[str] = []
    plain = Start.put_on
    monkeypatch.setattr(Start, "put_on", lambda self, *given: calls.append(self.name) or plain(self, *given))
    found = go_on(place, place / "first", tmp_path / "onward", judge__control="always")
    assert found["scores"]["learning"]["control"] is not None
    assert calls == ["first"]
    assert issubclass(ModelError, FineTuneError)


def test_merge_of_a_run_that_went_on_is_its_base_and_its_adapter(place: Path, tmp_path: Path) -> None:
    """Merged, each adapted weight is the first base's plus scale x B A of the adapter saved last, and no other."""
    go_on(place, place / "first", tmp_path / "onward")
    session = reopen(tmp_path / "onward")[1]
    (tmp_path / "merged").mkdir()
    session.save_model(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(place / "model" / "model.safetensors")
    adapter = load_file(tmp_path / "onward" / ADAPTER)
    moved = 0
    for name, weight in base.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        added = 0.0
        if f"{path}.lora_A.weight" in adapter:
            moved += 1
            a, b = (adapter[f"{path}.lora_{part}.weight"].astype(float) for part in "AB")
            added = 5 / 3**0.5 * (b @ a)
        assert merged[name] == pytest.approx((weight.astype(float) + added).astype("float32"), abs=1e-6)
    assert moved == 2
