"""Laws of what `ft estimate` tells: advice that fits and is the least change, and output that adds up."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.cli.app import run
from finetune.errors import UsageError
from finetune.evidence import memory as measure
from finetune.evidence.memory import measure_framework
from finetune.memory.advise import SHORTEST, say_size, scaled, ways_to_fit
from finetune.memory.estimate import adapter_parameters, estimate_memory
from finetune.memory.forecast import PARTS, forecast_memory
from finetune.memory.framework import FRAMEWORKS
from finetune.memory.load import StepLoad, full_load
from finetune.memory.outlook import FULL, LORA, foresee, outlook_notes, outlook_values
from finetune.processes import available_memory
from finetune.records import AdapterTarget, LinearLayer, ModelShape
from support.transformer_shapes import Job, Sizes, jobs

GIB = 1024**3
SMALL = Sizes("llama", hidden=47, inner=101, heads=6, kv_heads=2, head_dim=10, layers=3, vocab=997)
TARGET = AdapterTarget(3, 7.0, 0.0, SMALL.names())


def total_of(load: StepLoad) -> int:
    """What LoRA on the small model is expected to take."""
    return forecast_memory(SMALL.shape, TARGET, "float32", load, FRAMEWORKS["torch"]).expected.total


def changed(load: StepLoad, settings: dict[str, int | bool]) -> StepLoad:
    """The load that these settings make."""
    load = replace(load, recomputed=bool(settings.get("training.gradient_checkpointing", load.recomputed)))
    load = scaled(load, rows=settings.get("training.batch_size"), length=settings.get("tokens.max_length"))
    return replace(load, accumulation=settings.get("training.gradient_accumulation_steps", load.accumulation))


@given(st.integers(1, 40), st.integers(8, 300), st.floats(0, 1))
def test_advice_fits_and_is_the_least_change(rows: int, length: int, share: float) -> None:
    """Each way told makes it fit, and one row or token more would not; the batch that counts stays as large."""
    load = full_load(rows, length)
    floor, total = total_of(full_load(1, 2)), total_of(load)
    available = floor + round(share * (total - floor))
    ways = ways_to_fit(total_of, load, available)
    if total <= available:
        assert ways == []
    for way in ways:
        assert total_of(changed(load, way.settings)) == way.total <= available
        size, width = way.settings.get("training.batch_size"), way.settings.get("tokens.max_length")
        assert width is None or SHORTEST <= width < length
        assert size is None or width or size * way.settings["training.gradient_accumulation_steps"] >= rows
        assert size or width or way.flags == "--set training.gradient_checkpointing=true"
        more = {"training.batch_size": size + 1} if size and not width else {}
        more |= {"tokens.max_length": width + 1} if width else {}
        without = {} if way.settings == {"training.gradient_checkpointing": True} else {**way.settings, **more}
        assert total_of(changed(load, without)) > available
    if not ways and total > available:
        assert total_of(replace(scaled(load, rows=1, length=SHORTEST), accumulation=rows)) > available


def test_advice_takes_rows_and_length_together_only_where_neither_is_enough() -> None:
    """A memory that neither fewer rows nor shorter rows fit into gets one way that lowers both; none at all, none."""
    load = full_load(60, 300)
    again, rows, _ = ways_to_fit(total_of, load, total_of(full_load(30, 300)))
    assert (list(again.settings), again.flags) == (
        ["training.gradient_checkpointing"],
        "--set training.gradient_checkpointing=true",
    )
    available = total_of(full_load(1, 40))
    (way,) = ways_to_fit(total_of, load, available)
    assert (way.settings["training.batch_size"], way.settings["training.gradient_accumulation_steps"]) == (1, 60)
    assert SHORTEST <= way.settings["tokens.max_length"] <= 40
    assert ways_to_fit(total_of, load, 1) == []
    rows, length = ways_to_fit(total_of, load, total_of(full_load(3, 300)))
    assert list(rows.settings) == ["training.batch_size", "training.gradient_accumulation_steps"]
    assert list(length.settings) == ["tokens.max_length"]


@given(jobs(), st.integers(0, 2**36))
def test_outlook_says_whether_it_fits(job: Job, available: int) -> None:
    """What is expected to fit is said to, what may not is said not to be sure, and LoRA's ways are told with flags."""
    target = job.target or AdapterTarget(1, 1.0, 0.0, job.sizes.names())
    told = foresee(job.sizes.shape, target, job.dtype, job.load, FRAMEWORKS[job.backend], available)
    notes = {note.split(" ")[0]: note for note in outlook_notes(told)[-2:]}
    for word, method in (("LoRA", LORA), ("full", FULL)):
        band = told.forecasts[method]
        fits = band.expected.total <= available
        assert outlook_values(told)["lora" if method == LORA else "full"]["fits"] == fits
        assert ("does not fit" in notes[word]) == (not fits)
        assert ("may not" in notes[word]) == (fits and band.high.total > available)
    assert ("--set training.batch_size" in notes["LoRA"] or "--set tokens.max" in notes["LoRA"]) == bool(told.ways)
    unknown = job.sizes.kind == "other" and job.backend == "torch"
    assert any("not counted tensor by tensor" in note for note in outlook_notes(told)) == unknown
    assert FRAMEWORKS[job.backend].source in outlook_notes(told)[0]


@given(st.integers(0, 2**49))
def test_size_is_said_with_three_digits(size: int) -> None:
    """A size reads back within one in a hundred, in the unit that leaves a number from 1 to 1,023."""
    assume(size == 0 or size >= 1024)
    number, _, unit = say_size(size).partition(" ")
    value = float(number.replace(",", "")) * {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert value == pytest.approx(size, rel=0.01)
    assert len(number.replace(".", "").replace(",", "")) <= 4
    assert size == 0 or float(number.replace(",", "")) < 1024


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    """What `ft estimate --json` tells."""
    assert run(["estimate", "--json", *flags]) == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


@pytest.mark.parametrize("backend", sorted(FRAMEWORKS))
@pytest.mark.parametrize("model", ["reference-llama", "reference-gpt2"])
def test_estimate_json_adds_up(model: str, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts less overlap are the total, for both methods and in each column, with no ML framework installed."""
    value = told(capsys, "--model", model, "--backend", backend)
    for method in ("lora", "full"):
        parts = value[method]["parts"]
        assert sorted(parts) == sorted(PARTS)
        for column in ("low", "expected", "high"):
            summed = sum(parts[part][column] for part in PARTS)
            assert summed - value[method]["overlap"][column] == value[method]["total"][column]
    assert value["lora"]["parts"]["gradients"]["expected"] < 0.3 * value["full"]["parts"]["gradients"]["expected"]
    assert value["framework"]["backend"] == backend
    assert "measured" in value["framework"]["source"]


def test_estimate_follows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Batch size, length, accumulation and rank are those that are set; unset, the length is the model's own."""
    small = told(capsys, "--set", "training.batch_size=3", "--set", "tokens.max_length=20", "--set", "adapter.rank=2")
    assert small["batch"] == {
        "rows": 3,
        "length": 20,
        "targets": 57,
        "masked": False,
        "accumulation": 1,
        "recomputed": False,
    }
    assert "tokens.max_length" in small["basis"]
    large = told(capsys, "--set", "training.gradient_accumulation_steps=2")
    assert (large["batch"]["rows"], large["batch"]["length"], large["batch"]["accumulation"]) == (8, 512, 2)
    assert large["lora"]["trainable_parameters"] == 4 * small["lora"]["trainable_parameters"]
    assert large["lora"]["total"]["expected"] > small["lora"]["total"]["expected"]
    assert run(["estimate", "--set", "tokens.max_length=4000"]) == 2
    assert "512" in capsys.readouterr().err


def test_estimate_takes_the_largest_batch_of_ones_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --data, rows count as long as they are: fewer tokens, fewer of them trained, a mask where they share."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "three and four and five")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    value = told(capsys, "--data", str(path))
    batch = value["batch"]
    assert batch["rows"] == 3
    assert 10 < batch["length"] < 100
    assert 3 <= batch["targets"] < 0.5 * batch["rows"] * batch["length"]
    assert batch["masked"] is False
    assert str(path) in value["basis"]
    assert value["lora"]["parts"]["logits"]["low"] < value["lora"]["parts"]["logits"]["expected"]
    packed = told(capsys, "--data", str(path), "--set", "training.packing=true")["batch"]
    assert (packed["rows"], packed["targets"], packed["masked"]) == (1, batch["targets"], True)


def test_estimate_says_what_to_lower(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the job does not fit into free memory, it says by how much, and settings with which it would."""
    monkeypatch.setattr("finetune.processes.available_memory", lambda: GIB)
    assert run(["estimate", "--set", "training.batch_size=64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "LoRA does not fit" in shown
    assert "too much; lower it with --set training.gradient_checkpointing=true (" in shown
    assert "), or --set training.batch_size=" in shown
    assert "or --set tokens.max_length=" in shown
    value = told(capsys, "--set", "training.batch_size=64")
    assert value["available"] == GIB
    assert value["lora"]["fits"] is False
    again, rows, length = (way["settings"] for way in value["ways_to_fit"])
    assert again == {"training.gradient_checkpointing": True}
    assert told(capsys, "--set=training.batch_size=64", "--set=training.gradient_checkpointing=true")["lora"]["fits"]
    flags = [f"--set={key}={number}" for key, number in rows.items()]
    assert told(capsys, *flags)["lora"]["fits"] is True
    assert told(capsys, "--set", "training.batch_size=64", f"--set=tokens.max_length={length['tokens.max_length']}")[
        "lora"
    ]["fits"]


def test_estimate_table_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader sees each part for both methods, what the batch is, and where the framework's share was measured."""
    assert run(["estimate"]) == 0
    shown = capsys.readouterr().out
    for part in (*PARTS, "overlap (never at once)", "total"):
        assert sum(line.strip().startswith(part) for line in shown.splitlines()) == 1 + (part == "framework")
    assert "8 x 512 tokens at once, 4,088 of them trained" in shown
    assert "measured on Linux x86-64" in shown
    assert LORA in shown
    assert FULL in shown


def test_framework_of_a_backend_without_a_probe_is_not_measured() -> None:
    """Asked to measure what it cannot, it says so instead of telling a number."""
    with pytest.raises(UsageError, match="reference backend has no means"):
        measure_framework("reference")


def test_sizes_at_the_edge_of_a_unit_are_the_larger_unit() -> None:
    """What would be rounded to 1,000 is told in the next unit; nothing is 0, and a saving has its sign."""
    told = [say_size(round(kib * 1024)) for kib in (0, 1, 999.4, 999.5, 1024, 1024 * 999.5, -2048)]
    assert told == ["0", "1.00 KiB", "999 KiB", "0.98 MiB", "1.00 MiB", "0.98 GiB", "-2.00 MiB"]


MB = 10**6
HOLDING = """
from finetune.processes import peak_rss, restart_peak
before = peak_rss()
held = bytearray(b"x" * 60_000_000)
after = peak_rss()
del held
released = peak_rss()
restart_peak()
print(before, after, released, peak_rss())
"""


@pytest.mark.slow
def test_peak_is_what_this_process_held_and_not_its_parent() -> None:
    """A small process that a large one starts tells its own peak: it rises with what is held, stays, and restarts."""
    large = b"x" * 150 * MB
    done = subprocess.run([sys.executable, "-c", HOLDING], capture_output=True, text=True, check=True, timeout=60)
    before, after, released, restarted = (int(number) for number in done.stdout.split())
    assert before < 100 * MB < len(large)
    assert 50 * MB < after - before < 150 * MB
    assert released == after
    if sys.platform != "linux":
        pytest.skip("needs Linux: no other system can forget a peak")
    assert restarted < after - 40 * MB


def test_available_memory_is_of_this_machine() -> None:
    """There is some memory, in bytes, and no more than the machine has."""
    assert 2**20 < available_memory() <= psutil.virtual_memory().total


def test_framework_is_asked_for_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's own probe is asked for the framework alone, and its figure is given back as it is."""
    asked: list[Any] = []

    def ask(module: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append((module, request))
        return {"framework_rss": 123_456, "peak_rss": 1}

    monkeypatch.setattr(measure, "ask_child", ask)
    monkeypatch.setattr(measure, "find_spec", lambda name: name)
    assert measure_framework("torch") == 123_456
    assert asked == [("finetune.backends.torch.probe", {"method": "framework"})]


@given(jobs())
def test_estimate_of_what_is_certain_is_a_hand_count(job: Job) -> None:
    """Full training takes each number four times over; LoRA takes less exactly when its adapter is small enough.

    What adds up is the total; scale and dropout are no tensors.
    """
    shape, width = job.sizes.shape, {"float32": 4, "bfloat16": 2}[job.dtype]
    target = job.target or AdapterTarget(3, 7.0, 0.1, job.sizes.names())
    full, lora = (estimate_memory(shape, each, job.dtype) for each in (None, target))
    size = shape.parameters * width
    assert (full.weights, full.adapter, full.gradients, full.optimizer) == (size, 0, size, 2 * size)
    assert full.trainable_parameters == shape.parameters
    for found in (full, lora):
        assert found.total == found.weights + found.adapter + found.gradients + found.optimizer
    assert estimate_memory(shape, replace(target, alpha=99.0, dropout=0.7), job.dtype) == lora
    assert (lora.total < full.total) == (4 * 4 * lora.trainable_parameters < 3 * size)


def test_estimate_a_name_within_a_name_is_not_hit() -> None:
    """A target is a whole name: `q_proj` adapts neither `q_proj_up` nor a folder called so."""
    layers = (LinearLayer("a.q_proj_up", (3, 5)), LinearLayer("q_proj.other", (3, 5)), LinearLayer("b.q_proj", (7, 2)))
    shape = ModelShape("Test", 1000, 97, 20, 1, 40, layers)
    assert adapter_parameters(shape, AdapterTarget(2, 4.0, 0.0, ("q_proj",))) == 2 * (7 + 2)
    with pytest.raises(KeyError):
        estimate_memory(shape, None, "float16")
