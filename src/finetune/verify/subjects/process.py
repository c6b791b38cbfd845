"""A trainer in a process of its own: asked by lines of JSON, in bounded time, and ended with all that it started."""

import json
import os
import secrets
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from finetune.processes import end_all, end_marked, python_command, tie
from finetune.verify.subjects.serving import PROTOCOL
from finetune.verify.subjects.subject import About, SubjectError, unwrapped

_MARK = "FT_SUBJECT"
_MOST_BYTES = 64_000_000
_LAST_WORDS = 2_000
_RUNS = ("train", "resume", "run_process", "store_process")
_RUN_TAKES = 3
"""How many times as long as other questions a run may take."""
_MOST_SILENCES = 3
"""How often a program may let a question pass before it is asked no more: laws are many, and patience is one."""


class SubprocessSubject:
    """The subject to a program that answers as `serving.serve` does.

    The program lives in a folder that goes with the suite: its home and its temporary files are there too.

    Args:
        command: the program and its arguments.
        folder: where it lives; it is made.
        about: what it says of itself, where that is known: then it is started when it is first asked.
        patience: seconds after which a question that is not answered is given up; a run of training has three times
            as long.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        about: About | None = None,
        patience: float = 120,
        first_patience: float = 180,
    ) -> None:
        self._command = list(command)
        self._folder = folder
        self._environment = dict(environment or {})
        self._patience = patience
        self._first_patience = first_patience
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._silences = 0
        self.left_running: list[str] = []
        """What ran on after the program had ended, by its command."""
        try:
            self.about = about or self._start()
        except BaseException:
            self.close()
            raise

    def ask(self, ability: str, given: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer to one question; a program that has ended is started again.

        Raises:
            RefusesError, UnsupportedError, SubjectError: as `Subject.ask`.
        """
        if self._silences >= _MOST_SILENCES:
            raise SubjectError(f"it did not answer {self._silences} times, and is asked no more")
        if self._process is None:
            self._start()
        patience = self._patience * (_RUN_TAKES if ability in _RUNS else 1)
        return unwrapped(self._exchange({"ask": ability, "with": dict(given)}, patience), ability)

    def close(self) -> None:
        """End the program, and whatever it has started and left."""
        self._end(10)

    def _end(self, grace: float) -> None:
        """Let the program end by itself for so many seconds, or else end it; nothing that it started runs on."""
        process, self._process = self._process, None
        started, ended = [] if process is None else _started_by(process.pid), True
        if process is not None:
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            if process.poll() is None:
                ended = False
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        left = [*end_marked(_MARK, self._mark), *end_all(started)]
        # What is ended from outside cannot end what it has started.
        self.left_running += left if ended else []

    def _start(self) -> About:
        home = self._folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        own = {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home), _MARK: self._mark}
        self._errors = (self._folder / "stderr.txt").open("ab")
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=self._folder,
                env={**os.environ, **own, **self._environment, **tie()},
                start_new_session=True,
            )
        except OSError as error:
            raise SubjectError(f"{self._command[0]} cannot be started: {error.strerror}") from None
        finally:
            self._errors.close()
        return _introduced(self._exchange(None, self._first_patience))

    def _exchange(self, question: Mapping[str, object] | None, patience: float) -> Any:
        """Ask, and wait for one line."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        what = f"asked to {question['ask']}" if question else "started"
        try:
            if question is not None:
                process.stdin.write((json.dumps(question) + "\n").encode())
                process.stdin.flush()
            line = self._read_line(process, time.monotonic() + patience)
        except TimeoutError:
            self._silences += 1
            self._end(0)
            raise SubjectError(f"{what}, it did not answer within {patience:.0f} s, and was ended") from None
        except OSError:
            line = b""
        if not line:
            self.close()
            words = self._last_words()
            raise SubjectError(f"{what}, it ended with code {process.returncode}; its last words: {words or 'none'}")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            self._end(0)
            raise SubjectError(f"{what}, it answered with what is no JSON: {line[:300]!r}") from None

    def _read_line(self, process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        """One whole line, or nothing when the program has ended.

        Raises:
            TimeoutError: none came in time, or it never ends.
        """
        assert process.stdout is not None
        handle, line = process.stdout.fileno(), bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(handle, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or len(line) > _MOST_BYTES or not ready.select(left):
                    raise TimeoutError
                block = os.read(handle, 1 << 16)
                if not block:
                    return b""
                line += block
        return bytes(line)

    def _last_words(self) -> str:
        path = self._folder / "stderr.txt"
        return path.read_bytes()[-_LAST_WORDS:].decode(errors="replace") if path.exists() else ""


def _introduced(hello: Any) -> About:
    try:
        if hello["hello"] != PROTOCOL:
            raise SubjectError(f"it speaks version {hello['hello']!r} of the protocol, and this is {PROTOCOL}")
        abilities = {str(name): str(why) for name, why in hello["abilities"].items()}
        versions = {str(name): str(number) for name, number in hello["versions"].items()}
        return About(str(hello["name"]), versions, abilities)
    except (TypeError, KeyError, AttributeError):
        raise SubjectError(f"it did not say who it is, but: {str(hello)[:300]!r}") from None


def _started_by(number: int) -> list[psutil.Process]:
    """What a process has started that still runs, and what that has."""
    with suppress(psutil.Error):
        return psutil.Process(number).children(recursive=True)
    return []


def reference_oracle(folder: Path) -> SubprocessSubject:
    """Our trainer in float64, for what has to come out: in a process of its own, which no planted fault reaches."""
    command = python_command("-m", "finetune.verify.trainers.ours", "reference")
    return SubprocessSubject(command, folder, about=About("finetune with reference", {}, {}))
