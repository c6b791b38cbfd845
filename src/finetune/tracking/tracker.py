"""Trackers by name, what each must offer, and what it learns of a run when it opens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import MissingExtraError, install_line

NAMES = ("tensorboard", "trackio", "wandb", "mlflow")
"""Every tracker; its name is that of its package, of its extra and of its file here."""
NOTHING = -1
"""The last step of a tracker that holds none: step 0 is what was measured before training."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """The run that is tracked; `parameters` are its settings by dotted key.

    Another process began a resumed run, and may have told trackers of it up to any step.
    """

    id: str
    name: str
    project: str
    folder: Path
    parameters: Mapping[str, Any]
    resumed: bool = False


class Tracker(Protocol):
    """One place that numbers of runs are kept in."""

    place: str
    """Where it writes, for people."""
    last_step: int
    """The last step it holds already: only later ones are logged."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take in the numbers of one step; steps only go up."""

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Take in how the run ended, and write everything that waits."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed; nothing is imported.

    Raises:
        MissingExtraError: the packages are not installed; what to install is named.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"tracking.to asks for {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed",
            hint=f"{install_line(','.join(missing))}, or leave it out of tracking.to",
        )


def open_tracker(name: str, tracked: Tracked) -> Tracker:
    """The tracker of this name, ready to be told of the run."""
    tracker: Tracker = import_module(f"finetune.tracking.{name}").TRACKER(tracked)
    return tracker
