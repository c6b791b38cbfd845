"""Trains in several processes, from what was asked for to the finished run."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.abilities import require_backend
from finetune.distributed.launchers import Launch, check_launch
from finetune.distributed.supervise import watch
from finetune.run.folder import RunFolder


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

    What can be refused without loading data or model is refused before any process is started.

    Args:
        arguments: the module that each process runs, and the arguments of `ft train`; with `--resume` among them the
            run in `output` is resumed.
        command: what the user typed, to be written down in the run.
        say: is given every line that a process says.

    Raises:
        FineTuneError: something was refused, failed, or was interrupted.
    """
    require_backend(backend)
    check_launch(launch, backend, os.environ)
    resume = "--resume" in arguments
    folder = RunFolder.unfinished(output) if resume else RunFolder.place(output)
    own = [] if resume else [f"--set=training.processes={launch.processes}"]
    return watch(launch, [*arguments, f"--output={folder.path}", *own], folder, command=command, say=say)
