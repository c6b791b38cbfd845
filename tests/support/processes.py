"""`ft` in a process of its own, as its users start it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.warm import warm_starts

SECONDS = 300
MAIN = "from finetune.cli import main; main()"
IN_FOLDER = "import sys; sys.path.insert(0, ''); " + MAIN
"""As Python itself begins with `-c`, and not with `-P`."""


def settings(values: Mapping[str, object]) -> list[str]:
    """The options that give these settings."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def ft(
    *arguments: str, cwd: Path, limit: Callable[[], None] | None = None, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `ft` in a folder; `limit` is called in the new process before it begins.

    It begins with the libraries imported, unless it is to be `fresh`, or cannot.
    """
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    starts = None if fresh or limit else warm_starts(known)
    if starts:
        return starts.run(IN_FOLDER, *arguments, cwd=cwd, environment=known, timeout=SECONDS)
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=known, capture_output=True, text=True, preexec_fn=limit, timeout=SECONDS, check=False
    )


WARM = (".reload", ".plain", ".answer_worker")
"""The programs that load what was saved: what they take, nobody measures."""


def run_warm(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`; a program of `WARM` begins with the libraries imported where it can."""
    starts = warm_starts({**os.environ, "OMP_NUM_THREADS": "1"}) if command[-1].endswith(WARM) else None
    if starts is None:
        return subprocess.run(command, **how)
    code = f"import runpy; runpy.run_module({command[-1]!r}, run_name='__main__', alter_sys=True)"
    return starts.run(code, cwd=Path.cwd(), environment=starts.environment, given=how["input"], timeout=how["timeout"])
