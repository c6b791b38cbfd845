"""Starts the processes of a run, passes on their lines, and says how it ended.

Launchers keep exit codes to themselves, so that each process leaves a note of how far it is.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from finetune.abilities import require_backend
from finetune.distributed.launchers import Launch, check_launch, command_line, environment
from finetune.errors import FineTuneError, InterruptedRunError, LostProcessError, TrainingError
from finetune.files import write_json
from finetune.processes import end_with, terminated_as_interrupted
from finetune.run.folder import RunFolder

State = Literal["at work", "done", "failed", "lost", "stopped"]
_COMMAND, _LIFELINE = "command.json", "lifeline"
MARK = "\x02"
"""What a line of ours begins with; the launchers' own lines do not."""
_GRACE = 60.0
"""Seconds that processes have to end once they were asked to."""


@dataclass(frozen=True, slots=True)
class Note:
    """How far one process is: `lost` is what it is when another has ended, `stopped` when its launcher ends it."""

    rank: int
    pid: int
    state: State
    exit_code: int = 0
    message: str = ""
    hint: str = ""


def train_together(
    launch: Launch,
    backend: str,
    arguments: Sequence[str],
    *,
    output: Path | None,
    command: str,
    say: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Run `ft` with these arguments in every process, all in one run folder, until the run is done.

    What can be refused without loading data or model is refused before any process starts.

    Args:
        arguments: the module that each process runs, and the arguments of `ft train`; with `--resume` among them the
            run in `output` is resumed.
        command: what the user typed, written down in the run.
        say: receives every line that a process prints.

    Returns:
        The run folder and the content of its `run.json`.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted.
    """
    require_backend(backend)
    check_launch(launch, backend, os.environ)
    resume = "--resume" in arguments
    longer = any(word.startswith(("--epochs=", "--max-steps=", "--set=training.")) for word in arguments)
    folder = RunFolder.unfinished(output, longer=longer) if resume else RunFolder.place(output)
    own = [] if resume else [f"--set=training.processes={launch.processes}"]
    return watch(launch, [*arguments, f"--output={folder.path}", *own], folder, command=command, say=say)


def watch(
    launch: Launch, arguments: Sequence[str], folder: RunFolder, *, command: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Start the processes and watch them until the run in `folder` is done."""
    with tempfile.TemporaryDirectory(prefix="ft-launch-") as name:
        notes = Path(name)
        leave_command(notes, command)
        lines: deque[str] = deque(maxlen=20)
        with lifeline(notes) as held:
            code = _run(command_line(launch, arguments), environment(launch, os.environ, notes), say, lines, held)
        found = read_notes(notes)
    kept, hint = folder.resume_hint(launch=launch.options)
    if code is None:
        raise InterruptedRunError(f"interrupted; {kept}", hint=hint)
    if code < 0:
        raise LostProcessError(
            f"{launch.launcher} itself was killed (signal {-code}), and its processes were ended; {kept}", hint=hint
        )
    if error := _failure(launch, found, kept, hint):
        raise error
    if not found:
        raise TrainingError(f"{launch.launcher} started no process:\n" + "\n".join(lines))
    return folder.path, RunFolder.finished(folder.path).read_manifest()


def _failure(launch: Launch, notes: dict[int, Note], kept: str, hint: str) -> FineTuneError | None:
    """What went wrong, told of the process that it began with; None when every process is done."""
    failed = [note for note in notes.values() if note.state == "failed"]
    silent = [note for note in notes.values() if note.state == "at work"]
    # A failure of ours, known by its words, comes first; what else failed beside a silent one has failed for its lack.
    for note in failed if not silent else [note for note in failed if note.message]:
        where = f"rank {note.rank}: " if note.rank else ""
        error = FineTuneError(f"{where}{note.message or 'failed; its last words stand above'}", hint=note.hint)
        error.exit_code = note.exit_code
        return error
    ended = silent or [note for note in notes.values() if note.state != "done"]
    if not ended:
        return None
    who = " and ".join(f"rank {note.rank} (process {note.pid})" for note in ended)
    how = "ended without a word, as one that was killed or ran out of memory does" if silent else "was stopped"
    return LostProcessError(f"{who} of {launch.processes} {how}; {kept}", hint=hint)


@contextlib.contextmanager
def lifeline(notes: Path) -> Iterator[list[int]]:
    """A pipe in the folder of notes that every process hears end with us, or with its launcher: see `tie`."""
    os.mkfifo(notes / _LIFELINE)
    held = [os.open(notes / _LIFELINE, os.O_RDWR)]
    try:
        yield held
    finally:
        for handle in held:
            os.close(handle)


def tie(notes: Path) -> None:
    """End this process when the one that watches it, or their launcher, has ended."""
    pipe = os.open(notes / _LIFELINE, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(pipe, True)
    end_with(pipe)


def _run(
    command: Sequence[str],
    env: dict[str, str],
    say: Callable[[str], None],
    lines: deque[str],
    held: list[int],
) -> int | None:
    """Run the launcher to its end, and have what is left of its processes end; its exit code, None if interrupted."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    # The launchers may read standard input: one that is open and silent keeps them waiting.
    assert process.stdin is not None
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, say, lines), daemon=True)
    reader.start()
    interrupted = False
    with terminated_as_interrupted():
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            _end(process)
    os.close(held.pop())
    reader.join(timeout=10)
    process.stdin.close()
    if not reader.is_alive():  # else a process that outlived its launcher still holds the other end
        process.stdout.close()
    return None if interrupted else process.returncode


def _pass_on(stream: IO[str], say: Callable[[str], None], lines: deque[str]) -> None:
    for line in stream:
        before, mark, ours = line.rstrip("\n").rpartition(MARK)
        if mark:
            say(ours)
        else:
            lines.append(before or ours)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the launcher and its processes to end, and make them where they do not."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=_GRACE)
            return


def leave_note(folder: Path, note: Note) -> None:
    """Write down how far a process is, in place of what it wrote before."""
    write_json(folder / f"rank-{note.rank}.json", asdict(note))


def read_notes(folder: Path) -> dict[int, Note]:
    """The last note of each process, by its rank."""
    notes = [Note(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("rank-*.json"))]
    return {note.rank: note for note in notes}


def leave_command(folder: Path, command: str) -> None:
    """Write down the command that the user gave."""
    write_json(folder / _COMMAND, command)


def read_command(folder: Path) -> str:
    """The command that the user gave; "" where none was written down."""
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((folder / _COMMAND).read_text(encoding="utf-8")))
    return ""
