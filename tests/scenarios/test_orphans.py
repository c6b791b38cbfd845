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


PARTS = """
import time
from pathlib import Path
from finetune.processes import on_all_cores
def work(part):
    if part:
        time.sleep(0.2)
    return bytes(1_000_000)
for said in on_all_cores(work, 1000):
    Path("at work").touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="all is done in one process")
def test_children_that_do_parts_end_with_a_killed_process(tmp_path: Path) -> None:
    """Children that share the rows of a killed process have nobody to say theirs to, and end."""
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    cores = "import finetune.processes as p; p.usable_cores = lambda: 3"
    parent = psutil.Popen([sys.executable, "-c", f"{cores}\n{PARTS}"], env=told, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "at work").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    started = parent.children(recursive=True)
    assert len(started) == 3
    parent.kill()
    parent.wait()
    assert_none_left(started)


ENDLESS = """
import json, os, subprocess, sys
from pathlib import Path
def work():
    Path(os.environ["AT_WORK"]).touch()
    while True:
        sum(range(1000))
def work_with_another():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    work()
def main():
    if sys.argv[1:] == ["command"]:
        work_with_another()
    if sys.argv[1:] == ["subject"]:
        said = {"hello": 1, "name": "endless", "versions": {}, "abilities": {"train": ""}}
        print(json.dumps(said), flush=True)
        sys.stdin.readline()
        work_with_another()
    json.load(sys.stdin)
    work()
if __name__ == "__main__":
    main()
"""
PARENTS = {
    "asked": "from finetune.processes import ask_child; ask_child('endless', {})",
    "subject": """
import sys
from pathlib import Path
from finetune.verify.subjects.process import SubprocessSubject
SubprocessSubject([sys.executable, 'endless.py', 'subject'], Path.cwd()).ask('train', {})
""",
    "fork server": """
from pathlib import Path
from finetune.verify.stateful.fork_server import ForkServer
ForkServer([]).run('endless:work_with_another', [], Path.cwd(), None)
""",
    "command": """
import sys
from pathlib import Path
from finetune.verify.subjects.command import CommandSubject
from finetune.verify.subjects.command_file import CommandFile
train = {'argv': [sys.executable, str(Path('endless.py').absolute()), 'command']}
file = CommandFile.model_validate({'name': 'endless', 'train': train, 'refuses': [2]})
asked = {'model': 'model', 'settings': {}, 'rows': [], 'folder': 'made'}
CommandSubject(file, Path.cwd()).ask('train', asked)
""",
}


@pytest.mark.parametrize("kind", PARENTS)
def test_child_of_a_killed_process_ends(kind: str, tmp_path: Path) -> None:
    """A child that computes, and reads no input any more, ends with whoever started it, and so does what it started."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    told = {**os.environ, "PYTHONPATH": path, "AT_WORK": str(tmp_path / "at work")}
    parent = psutil.Popen([sys.executable, "-c", PARENTS[kind]], env=told, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "at work").exists():
        assert time.monotonic() < until
        assert parent.poll() is None
        time.sleep(0.02)
    started = parent.children(recursive=True)
    assert len(started) >= (1 if kind == "asked" else 2)
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
