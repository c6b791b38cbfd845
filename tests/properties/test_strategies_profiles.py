"""Laws of the profiles: the same cases where that is promised, more of them at night, and failures that are kept."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from zipfile import ZipFile

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis._settings import is_in_ci
from hypothesis.database import DirectoryBasedExampleDatabase, GitHubArtifactDatabase

from finetune.errors import UsageError
from finetune_strategies.profiles import EXAMPLES, PROFILES, RECEIVED, examples, failures_kept, load_profile, stories

pytestmark = pytest.mark.tools

SAME = ("quick", "fast")
RANDOM = tuple(name for name in PROFILES if name not in SAME)
TELL = """
from hypothesis import settings
from finetune_strategies.profiles import PROFILES, load_profile
load_profile()
for name in PROFILES:
    print(name, repr(settings.get_profile(name)))
"""


def test_profile_of_every_kind_is_there() -> None:
    """The six profiles ask for more cases the more time there is; none has a deadline or silences a health check."""
    assert PROFILES == ("quick", "fast", "ci", "slow", "thorough", "debug")
    counts = [settings.get_profile(name).max_examples for name in ("quick", "debug", "fast", "ci", "slow", "thorough")]
    assert counts == sorted(set(counts))
    steps = [settings.get_profile(name).stateful_step_count for name in ("quick", "fast", "ci", "slow", "thorough")]
    assert steps == sorted(set(steps))
    for profile in map(settings.get_profile, PROFILES):
        assert (profile.deadline, profile.suppress_health_check, profile.print_blob) == (None, (), True)
        assert Phase.shrink in profile.phases


def test_profiles_quick_and_fast_leave_nothing_to_chance_and_the_others_keep_failures() -> None:
    """Two make the same cases at every run and keeps nothing; the others differ each time and keep what fails."""
    for same in map(settings.get_profile, SAME):
        assert (same.derandomize, same.database) == (True, None)
    for profile in map(settings.get_profile, RANDOM):
        assert not profile.derandomize
        assert profile.database is not None
    explained = {name for name in PROFILES if Phase.explain in settings.get_profile(name).phases}
    assert explained == {"slow", "thorough", "debug"}


def test_profile_is_the_same_in_ci_as_at_home() -> None:
    """Where Hypothesis finds itself in CI it changes its defaults; ours stay what they are, whichever is loaded."""
    ci = {"CI": "true", "GITHUB_ACTIONS": "true", "HYPOTHESIS_PROFILE": "slow"}
    home = {name: value for name, value in os.environ.items() if name not in ci}
    there = home if is_in_ci() else {**home, **ci}
    told = subprocess.run([sys.executable, "-c", TELL], env=there, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [f"{name} {settings.get_profile(name)!r}" for name in PROFILES]


@pytest.mark.parametrize("name", ["fats", "FAST", "default"])
def test_profile_unknown_is_refused(name: str) -> None:
    """A profile that is none is refused, and those that are there are named."""
    with pytest.raises(UsageError, match=name) as caught:
        load_profile(environ={"HYPOTHESIS_PROFILE": name})
    assert all(profile in caught.value.hint for profile in PROFILES)


@given(st.sampled_from(PROFILES), st.floats(0, 4))
@examples(1 / 2)
def test_examples_are_a_share_of_the_profile(profile: str, share: float) -> None:
    """A law's share grows with the profile, is never none, and changes nothing else."""
    whole, part = settings.get_profile(profile), examples(share, of=profile)
    assert part.max_examples == max(1, round(share * whole.max_examples))
    assert repr(settings(part, max_examples=whole.max_examples)) == repr(whole)
    assert examples(share).max_examples == max(1, round(share * settings().max_examples))


@pytest.mark.parametrize("value", ["owner", "owner/", "/name", "a/b/c", "https://github.com/a/b"])
def test_failures_of_no_repository_are_refused(value: str) -> None:
    """What is not owner/name is refused with the value and the form."""
    with pytest.raises(UsageError, match="FT_HYPOTHESIS_REPO") as caught:
        load_profile(environ={"FT_HYPOTHESIS_REPO": value})
    assert value in caught.value.message
    assert "owner/name" in caught.value.hint


def test_failures_that_ci_kept_are_tried_next_to_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact that CI made of its failures is read as it is, ours are kept beside it, and it is never written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        GitHubArtifactDatabase, "_get_bytes", lambda self, url: pytest.fail(f"asked the network: {url}")
    )
    ci = DirectoryBasedExampleDatabase(tmp_path / "ci" / EXAMPLES)
    ci.save(b"a law", b"fails in CI")
    (tmp_path / RECEIVED).mkdir(parents=True)
    archive = tmp_path / RECEIVED / f"{datetime.now(UTC).isoformat().replace(':', '_')}.zip"
    with ZipFile(archive, "w") as packed:
        for file in (tmp_path / "ci" / EXAMPLES).rglob("*"):
            if file.is_file():
                packed.write(file, file.relative_to(tmp_path / "ci" / EXAMPLES))
    before = archive.read_bytes()
    both = failures_kept("owner/name")
    both.save(b"a law", b"fails here")
    assert set(both.fetch(b"a law")) == {b"fails in CI", b"fails here"}
    assert set(failures_kept().fetch(b"a law")) == {b"fails here"}
    both.delete(b"a law", b"fails in CI")
    assert archive.read_bytes() == before
    assert (tmp_path / EXAMPLES).is_dir()


def test_stories_are_a_share_of_the_profile() -> None:
    """A machine's share of cases and steps grows with the profile, and is never none."""
    profile = settings()
    part = stories(0.5, steps=0.2)
    assert part.max_examples == max(1, round(0.5 * profile.max_examples))
    assert part.stateful_step_count == max(1, round(0.2 * profile.stateful_step_count))
    assert stories(0, steps=0).max_examples == stories(0, steps=0).stateful_step_count == 1
