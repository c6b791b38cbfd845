"""`ft` in a process of its own, as its users start it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.processes import ask_child
from support.warm import warm_starts

SECONDS = 300
MAIN = "from finetune.cli import main; main()"


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
        return starts.run(MAIN, *arguments, cwd=cwd, environment=known, timeout=SECONDS)
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=known, capture_output=True, text=True, preexec_fn=limit, timeout=SECONDS, check=False
    )


def ask_warm_child(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """As `finetune.processes.ask_child`, in a process that begins with the libraries imported where it can."""
    known = {**os.environ, "OMP_NUM_THREADS": "1"}
    starts = warm_starts(known)
    if starts is None:
        return ask_child(module, dict(request))
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = starts.run(code, cwd=Path.cwd(), environment=known, given=json.dumps(request), timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
