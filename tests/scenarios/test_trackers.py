"""Laws of the real trackers, with no network: what a killed and resumed run told them, read by their own readers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.workplace import QUICK, make_data, make_model

STEPS = 6
HOW = "pip install 'finetune-suite[{}]'"
FT = "from finetune.cli import main; main()"
KILLED_AT_5 = """
import os, signal, time
from finetune.run.folder import RunFolder
from finetune.cli import main
from finetune.events import StepDone
from finetune.tracking import consumer

log, told, held = RunFolder.log, consumer._Line._log, []

def log_and_die(self, event):
    log(self, event)
    if isinstance(event, StepDone) and event.step == 5:
        while WAITING and 4 not in held:
            time.sleep(0.01)
        time.sleep(1.5 if WAITING else 0)  # some tools write in the background
        os.kill(os.getpid(), signal.SIGKILL)

def tell_and_note(self, tracker, step, numbers):
    told(self, tracker, step, numbers)
    held.append(step)

RunFolder.log, consumer._Line._log = log_and_die, tell_and_note
main()
"""
"""A real signal after step 5, with the newest checkpoint at step 3; with WAITING, once the tracker holds step 4."""
READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
found = EventAccumulator("run/tensorboard"); found.Reload()
points = {tag: [[one.step, one.value] for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
start = HParamsPluginData.FromString(found.PluginTagToContent("hparams")["_hparams_/session_start_info"])
values = start.session_start_info.hparams
said = found.Tensors("run")[0].tensor_proto.string_val[0].decode()
words = dict(line.strip("|").split("|") for line in said.splitlines()[2:])
told = {"points": points, "parameters": {key: values[key].number_value for key in values}, "words": words}
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
[run] = trackio.Api().runs("laws")
points, words = {}, {}
for line in SQLiteStorage.get_logs("laws", run.name):
    words |= {key: value for key, value in line.items() if isinstance(value, str) and key != "timestamp"}
    for key, value in line.items():
        if "/" in key and isinstance(value, float | int):
            points.setdefault(key, []).append([line["step"], value])
told = {"points": points, "parameters": run.config, "words": words}
""",
    "wandb": """
import struct
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def records(path):
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""

name = lambda item: item.key or ".".join(item.nested_key)
words, parameters, ids = {}, {}, set()
paths = sorted(Path("wandb").glob("offline-run-*/*.wandb"))
assert paths
for path in paths:
    points = {}  # the newest folder holds the whole run
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            values = {name(item): json.loads(item.value_json) for item in record.history.item}
            for key, value in values.items():
                if not key.startswith("_"):
                    points.setdefault(key, []).append([values["_step"], value])
        elif kind == "summary":
            words |= {name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "run":
            ids.add(record.run.run_id)
            parameters |= {name(item): json.loads(item.value_json) for item in record.run.config.update}
assert len(ids) == 1, ids
told = {"points": points, "parameters": parameters, "words": words}
""",
    "mlflow": """
from mlflow.tracking import MlflowClient
client = MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("laws").experiment_id])
points = {key: [[one.step, one.value] for one in client.get_metric_history(run.info.run_id, key)]
          for key in run.data.metrics}
told = {"points": points, "parameters": run.data.params, "words": run.data.tags | {"status": run.info.status}}
""",
}


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program where nothing of this machine's user is, and nobody is logged in."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    environment = {**outside, "HOME": str(cwd), "TRACKIO_DIR": str(cwd / "trackio"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "waiting"), [*((name, True) for name in READERS), ("tensorboard", False), ("wandb", False)]
)
def test_tracker_holds_the_run_that_was_killed_and_resumed(name: str, waiting: bool, tmp_path: Path) -> None:
    """Killed after or before it wrote, it holds each step once, with run.json's losses, settings and verdicts."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {HOW.format(name)}")
    make_model(tmp_path / "model")
    make_data(tmp_path / "rows.jsonl", 6)
    values = {
        **QUICK,
        "model.path": "model",
        "data.train": "rows.jsonl",
        "data.valid_fraction": 0.3,
        "training.epochs": 99.0,
        "training.max_steps": STEPS,
        "training.evaluate_every": 2,
        "training.save_every": 3,
        "tracking.to": f"[{name}]",
        "tracking.project": "laws",
    }
    given = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    first = python(KILLED_AT_5.replace("WAITING", str(waiting)), "train", *given, "--output", "run", cwd=tmp_path)
    assert first.returncode == -9, first.stderr
    second = python(FT, "train", "--resume", "--output", "run", "--json", cwd=tmp_path)
    assert second.returncode in (0, 1, 4), second.stderr
    record = json.loads(second.stdout)
    assert [tracker["failures"] for tracker in record["tracking"]] == [0], second.stderr
    assert f"tracker {name} writes to {record['tracking'][0]['place']}" in second.stderr
    read = python(f"import json\n{READERS[name]}\nprint(json.dumps(told))", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    check(name, json.loads(read.stdout.splitlines()[-1]), record)


def check(name: str, told: dict[str, Any], record: dict[str, Any]) -> None:
    """What was read back is what run.json says."""
    for mine, theirs in (("train", "train/loss"), ("held_out", "held_out/loss")):
        expected = [(point["step"], pytest.approx(point["loss"])) for point in record["losses"][mine]]
        assert [tuple(point) for point in told["points"][theirs]] == expected
    rates = [(point["step"], pytest.approx(point["learning_rate"])) for point in record["losses"]["train"]]
    assert [tuple(point) for point in told["points"]["train/learning_rate"]] == rates
    assert {"train/grad_norm", "train/tokens_per_second"} <= set(told["points"])
    assert float(told["parameters"]["training.learning_rate"]) == 0.01
    assert told["words"]["outcome"] == record["outcome"]
    verdicts = {f"verdict/{one['id']}": one["outcome"] for one in record["verdicts"]}
    assert verdicts.items() <= told["words"].items()
    if name == "mlflow":
        assert told["words"]["status"] == "FINISHED"


def test_trackers_that_are_not_here_are_refused_before_any_work(tmp_path: Path) -> None:
    """`ft train` and `ft check` refuse with exit code 3 and say what to install; nothing is written."""
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'wandb' else f(n, *a)\n"
    )
    make_model(tmp_path / "model")
    make_data(tmp_path / "rows.jsonl", 6)
    before = sorted(tmp_path.rglob("*"))
    given = ["--set", "tracking.to=[wandb]", "--model", "model", "--data", "rows.jsonl"]
    for verb, more in (("train", ["--backend", "reference"]), ("check", ["--set", "backend=reference"])):
        done = python(code + FT, verb, *given, *more, cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        assert "'finetune-suite[wandb]'" in done.stdout + done.stderr
        assert sorted(tmp_path.rglob("*")) == before
