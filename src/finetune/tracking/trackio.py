"""Trackio: a local database, shown by `trackio show`; or a Space, when TRACKIO_SPACE_ID names one."""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.tracking.tracker import NOTHING, Tracked


class Trackio:
    """Writes to where Trackio keeps its projects (`TRACKIO_DIR` moves it)."""

    def __init__(self, tracked: Tracked) -> None:
        import trackio

        _print_elsewhere()
        # Trackio finds the run to go on with by its name, and two run folders may well be called the same.
        name = f"{tracked.name}-{tracked.id[:6]}"
        self.last_step = _last_step(tracked.project, name) if tracked.resumed else NOTHING
        self._run: Any = trackio.init(
            project=tracked.project,
            name=name,
            config=dict(tracked.parameters),
            resume="allow" if tracked.resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.place = f"{Path(str(trackio.TRACKIO_DIR))}, project {tracked.project}, run {name}"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand over one step; Trackio writes it in the background."""
        self._run.log(dict(numbers), step=step)

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Hand over how the run ended, at the step after the last one, and wait until all is written."""
        if complete:
            self._run.log({**words, **numbers})
        self._run.finish()


def _print_elsewhere() -> None:
    """Have Trackio's own words go to standard error: standard output is for results.

    Its modules get a `print` of their own, for to redirect the stream would take other threads' words along.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            module.print = functools.partial(print, file=sys.stderr)  # type: ignore[attr-defined]


def _last_step(project: str, name: str) -> int:
    """The last step in the local database; what was still on its way when the process was killed comes after it."""
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_max_step_for_run(project, name)
    return NOTHING if found is None else int(found)


TRACKER = Trackio
