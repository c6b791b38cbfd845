"""How hard Hypothesis looks: profiles, each law's share of one, and where failures are kept.

| profile    | cases a law | seeds         | failures are kept   | for                                              |
|------------|-------------|---------------|---------------------|--------------------------------------------------|
| `fast`     | 24          | of the law    | no, they come again | work and pushes: the same cases on every machine |
| `ci`       | 100         | new each run  | `.hypothesis`       | one job of each push                             |
| `slow`     | 1,000       | new each run  | `.hypothesis`       | every night; minutes                             |
| `thorough` | 5,000       | new each run  | `.hypothesis`       | before a release; an hour or more                |
| `debug`    | 20          | new each run  | `.hypothesis`       | one law that fails: every case told, explained   |
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import Phase, Verbosity, settings
from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    ExampleDatabase,
    GitHubArtifactDatabase,
    MultiplexedDatabase,
    ReadOnlyDatabase,
)
from hypothesis.internal.conjecture import engine

from finetune.errors import UsageError

DEFAULT = "fast"
EXAMPLES = ".hypothesis/examples"
"""Where failures are kept; CI hands this folder on."""
ARTIFACT = "hypothesis-example-db"
"""The name under which CI hands it on."""
RECEIVED = ".hypothesis/received"
"""Where it is kept, for a day, by those who have asked for it."""
SHRINK_SECONDS = 30
"""How long one failing law is made smaller, except in `slow` and `thorough`, where nobody waits."""

MACHINE_SECONDS = {"fast": 120.0, "ci": 300.0, "slow": 1_200.0, "thorough": 7_200.0, "debug": 120.0}
"""How long one state machine begins new stories; it ends with the one that it is at."""

_BRIEFLY = tuple(phase for phase in Phase if phase is not Phase.explain)
_PROFILES: dict[str, dict[str, Any]] = {
    "fast": {"max_examples": 24, "stateful_step_count": 15, "derandomize": True, "phases": _BRIEFLY},
    "ci": {"max_examples": 100, "stateful_step_count": 20, "phases": _BRIEFLY},
    "slow": {"max_examples": 1_000, "stateful_step_count": 50},
    "thorough": {"max_examples": 5_000, "stateful_step_count": 100},
    "debug": {"max_examples": 20, "stateful_step_count": 15, "verbosity": Verbosity.verbose},
}
PROFILES = tuple(_PROFILES)
_UNHURRIED = ("slow", "thorough")


def load_profile(name: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Register every profile and load one: the named one, else `HYPOTHESIS_PROFILE`, else `fast`; returns its name.

    `FT_HYPOTHESIS_REPO=owner/name` lets every profile but `fast` try the failures that the CI of that GitHub
    repository has kept, too; it needs a `GITHUB_TOKEN`. Without that variable nothing is contacted.

    Raises:
        UsageError: there is no such profile, or the repository's name is none.
    """
    chosen = name or environ.get("HYPOTHESIS_PROFILE") or DEFAULT
    if chosen not in _PROFILES:
        raise UsageError(f"there is no Hypothesis profile {chosen!r}", hint=f"choose one of: {', '.join(PROFILES)}")
    kept = failures_kept(environ.get("FT_HYPOTHESIS_REPO", ""))
    # Where Hypothesis finds itself in CI it loads a profile of its own; ours must not inherit from that one.
    parent = settings.get_profile("default")
    for profile, changes in _PROFILES.items():
        database = None if changes.get("derandomize") else kept
        settings.register_profile(profile, parent, deadline=None, print_blob=True, database=database, **changes)
    settings.load_profile(chosen)
    return chosen


def limit_shrinking(profile: str) -> None:
    """Give a failing law `SHRINK_SECONDS` to become small; what was found until then is reported, and kept.

    Hypothesis has no setting for it, only this constant, which its authors leave open to change.
    """
    if not profile.startswith(_UNHURRIED):
        engine.MAX_SHRINKING_SECONDS = SHRINK_SECONDS


def failures_kept(repository: str = "") -> ExampleDatabase:
    """The failures of this checkout and, read only, those that the CI of `repository` (owner/name) handed on.

    Raises:
        UsageError: `repository` is not of that form.
    """
    local = DirectoryBasedExampleDatabase(EXAMPLES)
    if not repository:
        return local
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise UsageError(f"FT_HYPOTHESIS_REPO names no repository: {repository!r}", hint="write it as owner/name")
    shared = GitHubArtifactDatabase(owner, name, artifact_name=ARTIFACT, path=RECEIVED)
    return MultiplexedDatabase(local, ReadOnlyDatabase(shared))


def examples(share: float = 1.0, *, of: str | None = None) -> settings:
    """Decorates a law: it is to have this share of the cases that a profile gives a law, at least one.

    `of` names a profile whose cases they are, whichever is loaded; without it the loaded one decides.
    """
    profile = settings() if of is None else settings.get_profile(of)
    return settings(profile, max_examples=max(1, round(profile.max_examples * share)))


class _InTime(settings):
    """Settings that ask for no more cases once their time is up; it begins when Hypothesis first asks."""

    _clock: Callable[[], float] | None = None
    _end = float("inf")

    def limit(self, seconds: float, clock: Callable[[], float]) -> "_InTime":
        """Set the time."""
        self._seconds, self._clock = seconds, clock
        return self

    @property
    def max_examples(self) -> int:
        """As many as were asked for, or one: Hypothesis asks for more only while it has made fewer."""
        if self._clock is None:
            return self._max_examples
        now = self._clock()
        self._end = min(self._end, now + self._seconds)
        return self._max_examples if now < self._end else 1


def stories(share: float = 1.0, *, steps: float = 1.0, clock: Callable[[], float] = time.monotonic) -> settings:
    """Settings for a state machine: a share of the profile's cases and of its steps, within the profile's time.

    How many stories there was time for is among the cases that a run counts.
    """
    profile = settings()
    cases, length = (
        max(1, round(part * whole))
        for part, whole in ((share, profile.max_examples), (steps, profile.stateful_step_count))
    )
    seconds = MACHINE_SECONDS.get(settings.get_current_profile_name().partition("-with-")[0], MACHINE_SECONDS[DEFAULT])
    return _InTime(profile, max_examples=cases, stateful_step_count=length).limit(seconds, clock)
