"""Laws of what a killed process leaves running: nothing, whichever of them it was, within seconds."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.processes import MAIN, settings
from support.workplace import make_data, make_model

SECONDS = 5
"""So long may one that was started go on after whoever started it was killed."""
LONG = settings(
    {
        "training.max_steps": 100_000,
        "adapter.rank": 2,
        "training.save_every": 50,
        "judge.control": "never",
        "judge.memory": "never",
        "evaluation.questions": 2,
    }
)


def start(place: Path, *words: str, waits: Callable[[list[psutil.Process]], bool]) -> psutil.Popen:
    """`ft` at work, once those that it has started are as they are waited for."""
    with (place / "said").open("wb") as said:
        command = [sys.executable, "-c", MAIN, *words]
        process = psutil.Popen(command, cwd=place, stdout=said, stderr=said, start_new_session=True)
    until = time.monotonic() + 120
    while not waits(process.children(recursive=True)):
        assert process.poll() is None, (place / "said").read_text()
        assert time.monotonic() < until, (place / "said").read_text()
        time.sleep(0.05)
    return process


def assert_none_left(started: list[psutil.Process]) -> None:
    """All of them are gone within seconds; those that are not are ended here."""
    _, left = psutil.wait_procs(started, timeout=SECONDS)
    left = [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    told = [each.cmdline()[:8] for each in left]
    for each in left:
        each.kill()
    assert not told


CHILD = """
import json, os, sys, time
from pathlib import Path
json.load(sys.stdin)
Path(os.environ["AT_WORK"]).touch()
while True:
    sum(range(1000))
"""
PARENT = "from finetune.processes import ask_child; ask_child('endless', {})"


def test_child_of_a_killed_process_ends(tmp_path: Path) -> None:
    """A child that computes, and reads no input any more, ends with whoever asked it."""
    (tmp_path / "endless.py").write_text(CHILD)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    told = {**os.environ, "PYTHONPATH": path, "AT_WORK": str(tmp_path / "at work")}
    parent = psutil.Popen([sys.executable, "-c", PARENT], env=told)
    until = time.monotonic() + 60
    while not (tmp_path / "at work").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    started = parent.children(recursive=True)
    assert started
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert_none_left(started)


@pytest.mark.parametrize("victim", ["ft", "launcher"])
def test_processes_of_a_killed_launch_end(victim: str, tmp_path: Path) -> None:
    """Killed is the one that watches, or torchrun: no process trains on, and the message says which it was."""
    pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
    make_model(tmp_path / "model")
    make_data(tmp_path / "rows.jsonl", 12, step=0)
    words = ["train", "--model", "model", "--data", "rows.jsonl", "--output", "run", "--launch", "torchrun", *LONG]
    events = tmp_path / "run" / "events.jsonl"

    def at_work(started: list[psutil.Process]) -> bool:
        return len(started) >= 3 and events.exists() and b"StepDone" in events.read_bytes()

    watching = start(tmp_path, *words, "--processes", "2", waits=at_work)
    launcher, *workers = started = watching.children(recursive=True)
    (watching if victim == "ft" else launcher).kill()
    assert_none_left(started if victim == "ft" else workers)
    watching.wait(30)
    if victim == "launcher":
        said = (tmp_path / "said").read_text()
        assert "torchrun itself was killed (signal 9), and its processes were ended" in said
        assert "--resume --launch torchrun --processes 2 --output run" in said
