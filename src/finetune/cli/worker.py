"""What a launcher starts for `ft train --launch`: `ft` as one of several processes, which notes how it goes."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from finetune.cli.app import run
from finetune.distributed.environment import NOTES, rank_of
from finetune.distributed.supervise import MARK, Note, State, leave_note, tie
from finetune.errors import FineTuneError, LostProcessError


class _Marked:
    """A stream whose every line begins with our mark and, except for the first process, its rank."""

    def __init__(self, stream: TextIO, start: str) -> None:
        self._stream = stream
        self._start = start
        self._begins = True

    def write(self, text: str) -> int:
        """Write the text with a mark before each line."""
        if text:
            begun = self._start + text if self._begins else text
            self._begins = text.endswith("\n")
            self._stream.write(begun[:-1].replace("\n", f"\n{self._start}") + begun[-1])
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main() -> None:
    """Run `ft`, and note how it ended; the process that watches tells the user."""
    folder, rank = Path(os.environ[NOTES]), rank_of(os.environ)
    sys.stderr = _Marked(sys.stderr, MARK if rank == 0 else f"{MARK}rank {rank}: ")
    tie(folder)
    note = Note(rank, os.getpid(), "at work")
    leave_note(folder, note)

    def stop(number: int, frame: Any) -> None:
        leave_note(folder, replace(note, state="stopped", exit_code=128 + number))
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)

    errors = []

    def complain(error: FineTuneError) -> None:
        errors.append(error)
        state: State = "lost" if isinstance(error, LostProcessError) else "failed"
        leave_note(
            folder, replace(note, state=state, exit_code=error.exit_code, message=error.message, hint=error.hint)
        )

    try:
        code = run(sys.argv[1:], complain)
    except Exception:
        leave_note(folder, replace(note, state="failed", exit_code=1))
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not errors:
        leave_note(folder, replace(note, state="done" if code < 2 else "failed", exit_code=code))
    sys.exit(code)


if __name__ == "__main__":
    main()
