"""Laws of `ft train --launch` that need no framework: what is refused before a process is started, and what is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.backends import open_backend
from finetune.distributed import launchers as command
from finetune.distributed import supervise as watch
from finetune.distributed.environment import LAUNCHERS, NOTES, rank_of, started_by
from finetune.distributed.launchers import Launch, check_launch, command_line, environment, plan_launch
from finetune.distributed.supervise import Note, leave_note, read_notes
from finetune.errors import FineTuneError, LostProcessError, RefusedError
from finetune.run.folder import RunFolder

pytestmark = pytest.mark.tools

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
MLX = {"MLX_RANK": "1", "MLX_HOSTFILE": "/tmp/hosts"}

MODULE = "finetune.cli.worker"


@pytest.mark.parametrize(
    ("environ", "launcher", "rank"),
    [
        ({}, "", 0),
        (TORCHRUN, "torchrun", 1),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, "", 0),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate", 1),
        (MLX, "mlx.launch", 1),
    ],
)
def test_place_is_read_off_what_a_launcher_left(environ: dict[str, str], launcher: str, rank: int) -> None:
    """Rank and launcher come from the environment; a process that was started alone has none."""
    assert (started_by(environ), rank_of(environ)) == (launcher, rank)


@pytest.mark.parametrize("environ", [TORCHRUN, MLX])
def test_backend_of_one_process_refuses_to_be_one_of_several(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference backend knows no other process: started with some it refuses; alone it is a group of one."""
    backend = open_backend("reference")
    assert (backend.join().rank, backend.join().size) == (0, 1)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError, match="cannot join"):
        backend.join()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("backend", ["torch", "mlx", "reference"])
def test_launcher_and_backend_must_understand_each_other(
    launcher: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what fits is let through, and what is not installed is named with its extra."""
    fits = LAUNCHERS[launcher][0] == backend
    for there in (True, False):
        monkeypatch.setattr(command, "find_spec", lambda name, there=there: there or None)
        words = check_words(Launch(launcher, 2), backend)
        assert words == "" if fits and there else f"finetune-suite[{backend}]" in words if fits else "--launch" in words


def check_words(launch: Launch, backend: str, **environ: str) -> str:
    """What is said against a launch; "" where nothing is."""
    try:
        check_launch(launch, backend, environ)
    except FineTuneError as error:
        return f"{error} ({error.exit_code})"
    return ""


@pytest.mark.parametrize("environ", [TORCHRUN, MLX, {NOTES: "/tmp/x"}])
def test_launch_inside_a_launch_is_refused(environ: dict[str, str]) -> None:
    """A process that a launcher has started starts no others."""
    assert "--launch inside" in check_words(Launch("torchrun", 2), "torch", **environ)


@given(st.sampled_from(sorted(LAUNCHERS)), st.integers(1, 9), st.lists(st.text("ab -='\"", max_size=6), max_size=4))
def test_command_line_hands_every_word_on_as_it_is(launcher: str, processes: int, words: list[str]) -> None:
    """The launcher is told how many processes there are to be, and each is given the very words, in order."""
    if launcher == "mlx.launch":
        pytest.importorskip("mlx", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
    line = command_line(Launch(launcher, processes), [MODULE, "train", *words])
    assert line[line.index(MODULE) :] == [MODULE, "train", *words]
    assert str(processes) in line[: line.index(MODULE)]


def test_environment_leaves_the_users_own_settings_alone(tmp_path: Path) -> None:
    """Processes share the cores unless the user has said how; everything else is as it was."""
    assert environment(Launch("torchrun", 10**6), {"A": "b"}, tmp_path)["OMP_NUM_THREADS"] == "1"
    own = environment(Launch("torchrun", 2), {"OMP_NUM_THREADS": "7", "A": "b"}, tmp_path)
    assert (own["OMP_NUM_THREADS"], own["A"], own[NOTES]) == ("7", "b", str(tmp_path))


def ended(*notes: Note) -> FineTuneError | None:
    """What a watcher makes of these notes."""
    return watch._failure(Launch("torchrun", len(notes)), {note.rank: note for note in notes}, "step 4", "go on")


def test_watcher_tells_where_it_began() -> None:
    """A failure in words, else the process without a word, else the one that was stopped; not the one that lost it."""
    fine, lost, stopped = (Note(0, 10, state) for state in ("done", "lost", "stopped"))  # type: ignore[arg-type]
    silent, failed = Note(1, 11, "at work"), Note(1, 11, "failed", 3, "no such model", "look again")
    assert ended(fine, Note(1, 11, "done")) is None
    for first in (lost, stopped, fine, Note(0, 10, "failed", 1)):
        error = ended(first, silent)
        assert isinstance(error, LostProcessError)
        assert str(error).startswith("rank 1 (process 11) of 2 ended without a word")
        assert "step 4\n  hint: go on" in str(error)
    for first in (lost, stopped):
        error = ended(first, failed)
        assert (str(error), error.exit_code if error else 0) == ("rank 1: no such model\n  hint: look again", 3)
    both = ended(Note(0, 10, "failed", 3, "no such model"), failed)
    assert str(both) == "no such model"
    assert "rank 0 (process 10) and rank 1 (process 11)" in str(ended(Note(0, 10, "at work"), silent))
    assert "was stopped" in str(ended(stopped, Note(1, 11, "stopped")))


def test_notes_are_read_as_they_were_left(tmp_path: Path) -> None:
    """The last note of each process, whole."""
    leave_note(tmp_path, Note(0, 5, "at work"))
    leave_note(tmp_path, Note(11, 6, "failed", 3, "a\nb", "c"))
    leave_note(tmp_path, Note(0, 5, "done"))
    assert read_notes(tmp_path) == {0: Note(0, 5, "done"), 11: Note(11, 6, "failed", 3, "a\nb", "c")}


PRETENDER = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
from finetune.distributed.supervise import Note, leave_note
from finetune.distributed.supervise import MARK
folder = Path(os.environ["FT_LAUNCH"])
leave_note(folder, Note(0, 1, "at work"))
print("noise of a launcher")
print(MARK + "step 1", file=sys.stderr, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "told", "code"),
    [
        ('leave_note(folder, Note(0, 1, "failed", 3, "no such model"))', "no such model", 3),
        ("sys.exit(1)", "rank 0 (process 1) of 2 ended without a word", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "torchrun itself was killed (signal 9), and its processes were", 1),
        ('(folder / "rank-0.json").unlink()', "noise of a launcher", 1),
    ],
)
def test_watcher_passes_on_our_lines_and_keeps_the_launchers(
    then: str, told: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked lines reach the user without their mark, a launcher's own only where it started nothing."""
    text = PRETENDER.replace("{then}", then)
    monkeypatch.setattr(watch, "command_line", lambda launch, arguments: [sys.executable, "-c", text])
    heard: list[str] = []
    with pytest.raises(FineTuneError) as caught:
        watch.watch(Launch("torchrun", 2), [], RunFolder(tmp_path / "run"), command="ft x", say=heard.append)
    assert heard == ["step 1"]
    assert told in str(caught.value)
    assert caught.value.exit_code == code


def test_what_is_left_names_the_launch(tmp_path: Path) -> None:
    """The command that goes on is whole: how the processes are started, and a folder's name that a shell can read."""
    folder = RunFolder(tmp_path / "my run")
    assert folder.resume_hint() == ("nothing had been written yet", "")
    folder.make()
    folder.plan.write_text("x")
    kept, hint = folder.resume_hint(launch=Launch("accelerate", 3, Path("f.yaml")).options)
    assert kept == "no checkpoint had been written yet"
    options = "--launch accelerate --processes 3 --launch-config f.yaml"
    assert hint == f"go on with: ft train --resume {options} --output '{folder.path}'"


WORKER = [sys.executable, "-m", MODULE]


@pytest.mark.parametrize(
    ("arguments", "state", "code"),
    [
        (["--version"], "done", 0),
        (["train", "--model", "./nowhere", "--backend", "reference"], "failed", 3),
        (["train", "--nonsense"], "failed", 2),
    ],
)
def test_worker_notes_how_it_ended(arguments: list[str], state: str, code: int, tmp_path: Path) -> None:
    """Done, refused or misused: the note says so, with its exit code; what is told is marked as ours."""
    told: Any = {**os.environ, NOTES: str(tmp_path)}
    with watch.lifeline(tmp_path):
        done = subprocess.run([*WORKER, *arguments], env=told, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    note = read_notes(tmp_path)[0]
    assert (done.returncode, note.exit_code, note.state) == (code, code, state)
    assert all(line.startswith(watch.MARK) for line in done.stderr.split("\n") if line)
    assert ("nowhere" in note.message) == ("./nowhere" in arguments)


def test_worker_that_is_stopped_says_so(tmp_path: Path) -> None:
    """A launcher that ends the others when one has died asks them by SIGTERM: they are not taken for the dead one."""
    told: Any = {**os.environ, NOTES: str(tmp_path), "RANK": "3"}
    waiting = "import signal, os, threading\nfrom finetune.cli import worker\n"
    waiting += "worker.run = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or 0\nworker.main()\n"
    with watch.lifeline(tmp_path):
        done = subprocess.run([sys.executable, "-c", waiting], env=told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert read_notes(tmp_path)[3].state == "stopped"


def test_plan_takes_the_number_from_flag_setting_or_file(tmp_path: Path) -> None:
    """--processes, else training.processes, else what accelerate's own file says."""
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 5\n")
    assert plan_launch("accelerate", 2, file, planned=3).processes == 2
    assert plan_launch("accelerate", None, file, planned=3).processes == 3
    assert plan_launch("accelerate", None, file, planned=None).processes == 5


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distributed_type: TPU", "distributed_type 'TPU'"),
        ("distributed_type: NO", "distributed_type False"),
        ("num_machines: 2", "num_machines 2"),
        ("gpu_ids: 0,1", "gpu_ids '0,1'"),
        ("gpu_ids: [0]", r"gpu_ids \[0\]"),
        ("distributed_type: FSDP\nnum_machines: 1\ngpu_ids: all", ""),
    ],
)
def test_plan_refuses_a_file_that_asks_for_what_is_not_started(line: str, told: str, tmp_path: Path) -> None:
    """GPUs by number, other machines or kinds of devices are refused by name: never waited for, never left out."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(f"num_processes: 2\n{line}\n")
    if not told:
        assert plan_launch("accelerate", None, file, planned=None).processes == 2
        return
    with pytest.raises(RefusedError, match=told) as caught:
        plan_launch("accelerate", None, file, planned=None)
    assert caught.value.hint
