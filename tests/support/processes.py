"""`ft` in a process of its own, as its users start it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

MAIN = "from finetune.cli import main; main()"


def settings(values: Mapping[str, object]) -> list[str]:
    """The options that give these settings."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def ft(
    *arguments: str, cwd: Path, limit: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `ft` in a folder; `limit` is called in the new process before it begins."""
    command = [sys.executable, "-c", MAIN, *arguments]
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, env=known, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False
    )
