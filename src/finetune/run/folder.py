"""The folder of one run: what lies where, and who may make it."""

import contextlib
import json
import os
import secrets
import shlex
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from finetune.config import FORMAT
from finetune.errors import OutputError
from finetune.events import Event, RunStarted, StepDone
from finetune.files import (
    describe_files,
    flush,
    is_torn,
    remove_folder,
    remove_torn,
    storage_errors,
    write_json,
)
from finetune.reading import read_json
from finetune.run.checkpoints import CheckpointStore
from finetune.run.log import EventLog
from finetune.run.manifest import check_manifest

_HOLDER = "lock.json"
_LARGEST_MANIFEST = 2**28  # it holds the losses of every step


class RunFolder:
    """One run's folder; `run.json` is its manifest, written last: a run without it is unfinished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self.plan = path / "plan.yaml"
        self.manifest = path / "run.json"
        self.events = path / "events.jsonl"
        self._log = EventLog(self.events)
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.merged = path / "merged"
        self.gguf = path / "gguf"
        self.deploy = path / "deploy"
        self.evaluations = path / "evaluations"
        self.checkpoints = path / "checkpoints"
        self.report_page = path / "report.html"
        self.report_data = path / "report.json"
        self.holder = path / _HOLDER

    @classmethod
    def place(cls, output: Path | None) -> Self:
        """Where a new run will be: at `output`, or below `runs/` under a new name. Nothing is made yet.

        Raises:
            OutputError: the folder exists and is not empty, or is a file or a link.
        """
        path = output if output is not None else Path("runs") / new_run_id()
        if path.is_symlink():
            raise OutputError(f"output {path} is a symbolic link", hint="name a real folder")
        if path.is_file():
            raise OutputError(f"output {path} is a file", hint="choose a new folder with --output")
        # What a run killed at its very beginning leaves, before it had a plan: nothing that could be gone on with.
        if path.is_dir() and any(file.name != _HOLDER and not is_torn(file) for file in path.iterdir()):
            raise OutputError(
                f"output folder {path} exists and is not empty",
                hint="a run folder is never reused: choose a new --output, or continue that run with --resume",
            )
        return cls(path)

    def make(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable.{os.getpid()}.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"output folder {self.path} cannot be written: {error.strerror}", hint="choose another --output"
            ) from None

    @classmethod
    def unfinished(cls, output: Path | None, *, longer: bool = False) -> Self:
        """The run to resume: the one at `output`, or the newest unfinished one below `runs/`.

        Args:
            longer: it is to be made longer, so that the one at `output` may be finished.

        Raises:
            OutputError: there is none, or it is finished already.
        """
        if output is None:
            found = [cls(path.parent) for path in Path("runs").glob("*/plan.yaml")]
            open_runs = sorted((run for run in found if not run.manifest.exists()), key=lambda run: run.path.name)
            if not open_runs:
                raise OutputError("no unfinished run below runs/", hint="name the run with --output DIR")
            return open_runs[-1]
        run = cls(output)
        if not run.plan.exists():
            raise OutputError(
                f"{output} is not a run folder: it has no plan.yaml", hint="name a folder made by ft train"
            )
        if run.manifest.exists() and not longer:
            hint = "start a new one with another --output, or make it longer: --resume with --epochs or --max-steps"
            raise OutputError(f"the run in {output} is finished", hint=hint)
        return run

    def claim(self) -> None:
        """Keep everybody else out of this run until `release`, or until this process ends.

        The system's lock on the folder decides; the holder's process id is written beside it for others to read.

        Raises:
            OutputError: another process is at work in it, or it holds symbolic links.
        """
        links = sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_symlink())
        if links:
            raise OutputError(
                f"{self.path} holds symbolic links: {', '.join(links)}",
                hint="put the files themselves there: a run writes and removes what is in its folder",
            )
        try:
            import fcntl
        except ImportError:
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise OutputError(
                f"another process{_holder_in(self.holder)} is at work in {self.path}",
                hint="wait for it to end, or choose another --output",
            ) from None
        self._lock = handle
        # Written in place, for a temporary file of a process killed here would keep the folder from use.
        with storage_errors(self.holder):
            self.holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")

    def release(self) -> None:
        """Let others in again; nothing happens where nothing was claimed."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a disk that cannot be written now: the error that told of it stands
                self.holder.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep everybody else out for a while, and clear what one that was killed has left half written.

        Raises:
            OutputError: as `claim`.
        """
        self.claim()
        try:
            for folder in (self.path, self.gguf):
                remove_torn(folder)
            yield
        finally:
            self.release()

    def describe(self) -> list[dict[str, Any]]:
        """Path, size and hash of every file of the run; the lock is none of them."""
        return [file for file in describe_files(self.path) if file["path"] != self.holder.name]

    def sizes(self) -> dict[str, int]:
        """The size of every file of the run by its path, without reading one."""
        files = [file for file in self.path.rglob("*") if file.is_file() and file != self.holder]
        return {file.relative_to(self.path).as_posix(): file.stat().st_size for file in sorted(files)}

    def tidy(self) -> None:
        """Make a run ready to begin or to go on: what a killed process left half written goes.

        So do what it saved and its report: they are in an unfinished run when it was killed just before its manifest,
        and are written again.
        """
        for folder in (self.path, self.checkpoints):
            remove_torn(folder)
        for saved in (self.adapter, self.model):
            if saved.exists():
                remove_folder(saved)
        with storage_errors(self.path):
            self.report_page.unlink(missing_ok=True)
            self.report_data.unlink(missing_ok=True)

    @classmethod
    def finished(cls, path: Path) -> Self:
        """A complete run.

        Raises:
            OutputError: there is no run, or it never finished.
        """
        run = cls(path)
        if not path.is_dir():
            raise OutputError(f"run folder {path} does not exist", hint="ft train makes one")
        if not run.manifest.exists():
            hint = f"continue it: ft train --resume --output {path}" if run.plan.exists() else "name a folder in runs/"
            raise OutputError(f"{path} holds no finished run (no run.json)", hint=hint)
        return run

    def resume_hint(self, *, launch: str = "") -> tuple[str, str]:
        """What an unfinished run has kept, and the command that resumes it; "" where it cannot be resumed.

        Args:
            launch: the options that start its processes, such as `--launch torchrun --processes 2`.
        """
        if not self.plan.exists():
            return "nothing had been written yet", ""
        newest = CheckpointStore(self.checkpoints).newest()
        kept = f"the checkpoint of step {newest} is intact" if newest else "no checkpoint had been written yet"
        words = ["ft train --resume", *([launch] if launch else []), "--output", shlex.quote(str(self.path))]
        return kept, f"go on with: {' '.join(words)}"

    def read_manifest(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            OutputError: it is broken.
        """
        try:
            value: dict[str, Any] = read_json(self.manifest, _LARGEST_MANIFEST)
            older = value.get("format") if isinstance(value, dict) else FORMAT
            if isinstance(older, int) and older != FORMAT:
                raise OutputError(
                    f"{self.manifest} is of format {older}, and this version of FineTune reads format {FORMAT}",
                    hint="use the version that made it, or train anew",
                )
            check_manifest(value)
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.manifest} is broken: {error}", hint="the run must be repeated") from None
        return value

    def write_manifest(self, values: Mapping[str, object]) -> None:
        """Finish the run: from now on it exists."""
        write_json(self.manifest, values)

    def log(self, event: Event) -> None:
        """Append one event as a line of JSON."""
        self._log.append(event)

    def read_events(self) -> list[Event]:
        """Every event that was logged whole; none where nothing was logged.

        Raises:
            OutputError: a line is not as it was written.
        """
        return self._log.read()

    def begun(self) -> RunStarted | None:
        """What the log says of the run's beginning; None where it does not, or is not as it was written."""
        with contextlib.suppress(OutputError):
            return next((event for event in self.read_events() if isinstance(event, RunStarted)), None)
        return None

    def learning_rates(self) -> dict[int, float]:
        """The learning rate of each step that was logged."""
        return {event.step: event.learning_rate for event in self.read_events() if isinstance(event, StepDone)}

    def secure_events(self) -> None:
        """Flush the log to disk: a checkpoint may only follow the events that led to it."""
        with storage_errors(self.events):
            flush(self.events)

    def events_up_to(self, done: int) -> list[Event]:
        """What was logged up to the checkpoint of step `done`; what came later is done again.

        Raises:
            OutputError: a line is not as it was written, or the steps up to `done` are not all there; without them the
                run cannot be judged.
        """
        return self._log.up_to(done)

    def rewind_events(self, done: int) -> None:
        """Forget what was logged after the checkpoint of step `done`.

        Raises:
            OutputError: as `events_up_to`.
        """
        self._log.rewind(done)


def _holder_in(path: Path) -> str:
    """Which process holds a run, as it wrote itself; empty where that cannot be read."""
    try:
        holder = read_json(path)
        return f" (process {int(holder['pid'])} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def new_run_id() -> str:
    """A name that sorts by time, to the microsecond, and that no other run has, even one begun at that microsecond."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"
