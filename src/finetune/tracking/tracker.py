"""What a tracker must offer, and what it is told of a run when it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NOTHING = -1
"""The last step of a tracker that holds none: step 0 is what was measured before training."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """The run that is tracked.

    `id` is its own, `name` is for people, `parameters` are its settings by dotted key. A resumed run was begun by
    another process, which may have told trackers of it up to any step.
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
    """The last step it holds already: up to there nothing is told again, and after it everything is."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take in the numbers of one step; steps only go up."""

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Take in how the run ended, and write what is not written yet."""
