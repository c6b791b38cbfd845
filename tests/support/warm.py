"""Processes that begin with torch, transformers and PEFT imported: each is a fork of one that has done nothing else.

Importing them takes a processor 5 to 8 s. What begins here is a process of its own all the same, with its own memory,
folder and streams, and nothing of FineTune in it; who measures a start, a process's memory, or two processes against
each other, starts them with `support.processes.ft(..., fresh=True)` or by hand.

As a program this file is the one that is forked: it reads a line of JSON for each process, and tells its number and
how it ended.
"""

import atexit
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

STREAMS = ("stdin", "stdout", "stderr")
LIBRARIES = ("torch", "transformers", "peft")
LATE = ("OLLAMA_HOST", "PYTEST_CURRENT_TEST")
"""Variables that nobody reads as he is imported; if another differs, what was imported may not be what is wanted."""
Ended = subprocess.CompletedProcess[str]


class WarmStarts:
    """Starts programs, one after the other, as forks of a process that has imported the libraries."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.lock = threading.Lock()
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.forked = subprocess.Popen(command, env=self.environment, text=True, **pipes)
        atexit.register(self.close)

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries were imported in this environment."""
        own, asked = ({k: v for k, v in each.items() if k not in LATE} for each in (self.environment, environment))
        return own == asked

    def close(self) -> None:
        """End it: it has nothing more to read."""
        self.forked.communicate(timeout=60)

    def run(
        self, code: str, *arguments: str, cwd: Path, environment: Mapping[str, str], given: str = "", timeout: float
    ) -> Ended:
        """Run a program of Python's with these arguments; what it read, printed, and how it ended.

        Raises:
            TimeoutExpired: it took so many seconds, and was ended.
        """
        with self.lock, tempfile.TemporaryDirectory(prefix="finetune-warm-") as folder:
            files = {name: Path(folder) / name for name in STREAMS}
            files["stdin"].write_text(given, encoding="utf-8")
            asked = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": dict(environment)}
            self._tell(asked | {name: str(path) for name, path in files.items()})
            number = int(self._hear())
            late = threading.Timer(timeout, os.kill, (number, 9))
            late.start()
            code_of_end = int(self._hear())
            expired = not late.is_alive()
            late.cancel()
            said, words = (files[name].read_text(encoding="utf-8", errors="replace") for name in STREAMS[1:])
        if expired:
            raise subprocess.TimeoutExpired([code, *arguments], timeout, said, words)
        return subprocess.CompletedProcess([code, *arguments], code_of_end, said, words)

    def _tell(self, asked: Mapping[str, object]) -> None:
        assert self.forked.stdin
        self.forked.stdin.write(json.dumps(asked) + "\n")
        self.forked.stdin.flush()

    def _hear(self) -> str:
        assert self.forked.stdout
        line = self.forked.stdout.readline()
        assert line, "the process that is forked has ended"
        return line


_starts = cache(lambda: WarmStarts({**os.environ, "OMP_NUM_THREADS": "1"}))


def warm_starts(environment: Mapping[str, str]) -> WarmStarts | None:
    """The one of this session; None where it does not fit, nothing can be forked, or the libraries are missing."""
    able = sys.platform == "linux" and all(find_spec(name) for name in LIBRARIES)
    return _starts() if able and _starts().fits(environment) else None


def serve() -> str:
    """Fork for each line that is read; returns the code only in a fork, and never in the one that is forked."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "who has threads cannot be forked"
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if not (number := os.fork()):
            return begin(asked)
        print(number, flush=True)
        status = os.waitpid(number, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


def begin(asked: Mapping[str, object]) -> str:
    """Become the process that was asked for: its streams, folder, environment and arguments; returns its code."""
    for name in STREAMS:
        file = os.open(str(asked[name]), os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, STREAMS.index(name))
        os.close(file)
    with contextlib.suppress(FileNotFoundError):
        os.chdir(str(asked["cwd"]))
    environment, arguments = asked["environment"], asked["arguments"]
    assert isinstance(environment, Mapping)
    assert isinstance(arguments, Sequence)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    return str(asked["code"])


if __name__ == "__main__":
    program = serve()
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
