"""How hard Hypothesis looks: profiles, each law's share of one, and where failures are kept.

| profile    | cases a law | seeds         | failures are kept   | for                                              |
|------------|-------------|---------------|---------------------|--------------------------------------------------|
| `quick`    | 8           | of the law    | no, they come again | Tier 1 in its 30 seconds                         |
| `fast`     | 24          | of the law    | no, they come again | work and pushes: the same cases on every machine |
| `ci`       | 100         | new each run  | `.hypothesis`       | one job of each push                             |
| `slow`     | 1,000       | new each run  | `.hypothesis`       | every night; minutes                             |
| `thorough` | 5,000       | new each run  | `.hypothesis`       | before a release; an hour or more                |
| `debug`    | 20          | new each run  | `.hypothesis`       | one law that fails: every case told, explained   |
"""

import os
from collections.abc import Mapping
from typing import Any

from hypothesis import Phase, Verbosity, settings
from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    ExampleDatabase,
    GitHubArtifactDatabase,
    MultiplexedDatabase,
    ReadOnlyDatabase,
)

from finetune.errors import UsageError

DEFAULT = "fast"
EXAMPLES = ".hypothesis/examples"
"""Where failures are kept; CI hands this folder on."""
ARTIFACT = "hypothesis-example-db"
"""The name under which CI hands it on."""
RECEIVED = ".hypothesis/received"
"""Where it is kept, for a day, by those who have asked for it."""
_BRIEFLY = tuple(phase for phase in Phase if phase is not Phase.explain)
_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {"max_examples": 8, "stateful_step_count": 10, "derandomize": True, "phases": _BRIEFLY},
    "fast": {"max_examples": 24, "stateful_step_count": 15, "derandomize": True, "phases": _BRIEFLY},
    "ci": {"max_examples": 100, "stateful_step_count": 20, "phases": _BRIEFLY},
    "slow": {"max_examples": 1_000, "stateful_step_count": 50},
    "thorough": {"max_examples": 5_000, "stateful_step_count": 100},
    "debug": {"max_examples": 20, "stateful_step_count": 15, "verbosity": Verbosity.verbose},
}
PROFILES = tuple(_PROFILES)


def load_profile(name: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Register every profile and load one: the named one, else `HYPOTHESIS_PROFILE`, else `fast`; returns its name.

    `FT_HYPOTHESIS_REPO=owner/name` lets profiles with new seeds try the failures that the CI of that GitHub
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


def stories(share: float = 1.0, *, steps: float = 1.0) -> settings:
    """Settings for a state machine: a share of the profile's cases and of its steps, at least one of each."""
    profile = settings()
    length = max(1, round(steps * profile.stateful_step_count))
    return settings(examples(share), stateful_step_count=length)
