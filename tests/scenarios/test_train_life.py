"""A fine-tune as its user lives it: real processes, interrupted, resumed, starved of disk, read by PEFT alone."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.processes import MAIN, ft

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytestmark = pytest.mark.tier2

WIKISQL = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikisql" / "train.jsonl"
QUICK = ["--set", "judge.control=never", "--set", "judge.memory=never", "--set", "training.max_steps=10"]


def manifest(run: Path) -> dict[str, Any]:
    """What the run's `run.json` says."""
    value: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run, with dropout so that random state matters."""
    folder = tmp_path_factory.mktemp("life")
    done = ft("train", *QUICK, "--set", "adapter.dropout=0.1", "--output", "run", "--json", cwd=folder)
    assert done.returncode in (0, 1, 4), done.stderr
    return folder / "run"


def test_json_goes_to_stdout_and_words_to_stderr(tmp_path: Path) -> None:
    """`ft train --json` in an empty folder prints one JSON document on standard output, progress elsewhere."""
    done = ft("train", *QUICK, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["status"] == "complete"
    assert "step 10/10" in done.stderr
    assert (tmp_path / told["folder"] / "run.json").exists()


def test_run_folder_holds_what_the_contract_says(finished: Path) -> None:
    """Every promised file is there, and the manifest's hashes are those of the files."""
    from finetune.files import file_hash

    run = manifest(finished)
    listed = {file["path"]: file["sha256"] for file in run["artifacts"]}
    promised = {"plan.yaml", "events.jsonl", "report.html", "report.json", "adapter/adapter_model.safetensors"}
    assert promised <= set(listed)
    assert all(file_hash(finished / path) == digest for path, digest in listed.items())
    assert len(listed) >= 10
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "StepDone"] == list(range(1, 11))
    assert run["machine"]["device"].partition(":")[0] in ("cpu", "cuda")
    counts = run["data"]["train"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())


def test_adapter_loads_with_peft_alone(finished: Path) -> None:
    """A process without FineTune loads the adapter with PEFT, gets other logits than the base, and knows the stops."""
    from finetune.models.locate import SHIPPED_FOLDER

    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
base = AutoModelForCausalLM.from_pretrained({str(SHIPPED_FOLDER / "reference-llama")!r}).eval()
ids = torch.tensor([[5, 6, 7, 300]])
before = base(input_ids=ids).logits.clone()
tuned = PeftModel.from_pretrained(base, {str(finished / "adapter")!r}).eval()
taught = GenerationConfig.from_pretrained({str(finished / "adapter")!r})
assert {{1, 7}} <= set(taught.eos_token_id) == set(base.generation_config.eos_token_id)
assert (tuned(input_ids=ids).logits - before).abs().max() > 1e-3
assert not [name for name in sys.modules if name.startswith("finetune")]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


STOPPED_AT_3 = """
import os, signal
from finetune.run.checkpoints import CheckpointStore
from finetune.cli import main

save = CheckpointStore.save

def save_and_stop(self, step, *rest, **more):
    path = save(self, step, *rest, **more)
    if step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return path

CheckpointStore.save = save_and_stop
main()
"""
"""A real signal at a moment that no load of the machine can move: right after the checkpoint of step 3."""


def test_interrupted_run_resumes_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and leaves a checkpoint; `--resume` gives the adapter an uninterrupted run gives."""
    settings = [*QUICK, "--set", "adapter.dropout=0.1", "--set", "training.save_every=3"]
    command = [sys.executable, "-c", STOPPED_AT_3, "train", *settings, "--output", "run"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    run, told = tmp_path / "run", child.stderr
    assert not (run / "run.json").exists()
    assert child.returncode == 130, told
    assert "ft train --resume --output" in told
    resumed = ft("train", "--resume", "--output", "run", cwd=tmp_path)
    assert resumed.returncode in (0, 1, 4), resumed.stderr
    ours, theirs = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, finished))
    assert ours == theirs
    losses = [[point["loss"] for point in manifest(folder)["losses"]["train"]] for folder in (run, finished)]
    assert losses[0] == losses[1]
    run_record = manifest(run)
    assert "--resume" not in run_record["command"]
    assert any("resumed from step" in note for note in run_record["notes"])
    again = ft("train", "--resume", "--output", "run", cwd=tmp_path)
    assert again.returncode == 3
    assert "finished" in again.stderr


def test_evaluate_and_chat_work_on_a_finished_run(finished: Path) -> None:
    """A finished run can be scored again with the numbers it recorded, and talked to."""
    done = ft("evaluate", str(finished), "--json", cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    told, run = json.loads(done.stdout), manifest(finished)
    learning = run["scores"]["learning"]
    assert told["trained questions"]["base"] == learning["base"]["right"]
    assert told["trained questions"]["tuned"] == learning["tuned"]["right"]
    assert told["loss"]["tuned"] == pytest.approx(run["losses"]["fixed"][-1]["loss"], rel=1e-6)
    said = ft("chat", str(finished), "--prompt", "Repeat: Paris", cwd=finished.parent)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    assert "<|" not in said.stdout


def test_run_folder_takes_one_process_at_a_time(tmp_path: Path) -> None:
    """While a run is at work, resuming it elsewhere is refused, and the run's evidence is its own."""
    settings = [*QUICK[:4], "--set", "training.max_steps=60", "--set", "training.save_every=2"]
    command = [sys.executable, "-c", MAIN, "train", *settings, "--output", "run"]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "plan.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGSTOP)
    second = ft("train", "--resume", "--output", "run", cwd=tmp_path)
    child.send_signal(signal.SIGCONT)
    assert child.wait(timeout=120) in (0, 1)
    assert second.returncode == 3, second.stderr
    assert f"another process (process {child.pid} on " in second.stderr
    assert [point["step"] for point in manifest(tmp_path / "run")["losses"]["train"]] == list(range(1, 61))


def test_rows_that_are_not_trained_are_not_asked(tmp_path: Path) -> None:
    """A row dropped for its length is no trained question, and evaluation refuses data that has changed since."""
    short = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "three", "four")]
    long = [{"prompt": "Say " + "very " * 200 + word, "completion": word} for word in ("five", "six")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in short + long))
    limit = ["--set", "tokens.max_length=48"]
    done = ft("train", "--data", "rows.jsonl", *QUICK, *limit, "--output", "run", "--json", cwd=tmp_path)
    run = json.loads(done.stdout)
    assert run["data"]["train"]["dropped"] == {"longer than 48 tokens": 2}
    asked = {answer["expected"] for answer in run["scores"]["learning"]["tuned"]["answers"]}
    assert asked == {"one", "two", "three", "four"}
    data.write_text(data.read_text() + json.dumps(short[0]) + "\n")
    again = ft("evaluate", "run", cwd=tmp_path)
    assert again.returncode == 3
    assert "has changed since" in again.stderr


@pytest.mark.skipif(not WIKISQL.exists(), reason=f"real text rows are not at {WIKISQL}: put them there to judge them")
def test_text_rows_are_learned_and_counted(tmp_path: Path) -> None:
    """A thousand text rows nobody here wrote: every row is accounted for and the held-out loss falls.

    Questions about one table say nearly the same: they are other rows still, on which the loss is judged, and told.
    """
    settings = ["--set", "training.max_steps=40", "--set", "judge.memory=never", "--set", "training.learning_rate=2e-3"]
    settings += ["--set", "judge.allow_inconclusive=true"]  # nothing was asked: its memory, its answers
    done = ft("train", "--data", str(WIKISQL), *settings, "--output", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    run = json.loads(done.stdout)
    train, valid = run["data"]["train"], run["data"]["valid"]
    assert train["read"] + valid["read"] == 1000
    assert all(part["read"] == part["kept"] + sum(part["dropped"].values()) for part in (train, valid))
    outcomes = {verdict["id"]: verdict["outcome"] for verdict in run["verdicts"]}
    [held_out] = [verdict for verdict in run["verdicts"] if verdict["id"] == "loss-held-out"]
    assert (held_out["outcome"], held_out["measured"].endswith(" rows nearly as in training")) == ("passed", True)
    assert outcomes["claim-rows"] == "passed"
    assert outcomes["claim-retention"] == "inconclusive"  # this base reads no English prose
    assert outcomes["model-learning"] == "not applicable"
