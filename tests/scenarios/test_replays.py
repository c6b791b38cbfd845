"""Laws of failures, in real runs: each comes again by what Hypothesis prints, and what CI found comes up at home."""

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from finetune_strategies.profiles import ARTIFACT, EXAMPLES, RECEIVED

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TWO_LAWS = """
from hypothesis import assume, given, strategies as st
@given(st.integers())
def test_first(number):
    pass
@given(st.integers())
def test_second(number):
    assume(number % 2)
"""
KEPT = """
from pathlib import Path
from hypothesis import given, strategies as st
@given(st.integers(0, 2**64))
def test_number(number):
    assert number != 123_457_211_309 if Path("exactly").exists() else number < 123_457_211_309
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of pytest in a project of its own, with the hooks of this one."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "pytest.ini").touch()
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "HYPOTHESIS_", "FT_"))
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


def test_failure_comes_again_by_what_is_printed(tmp_path: Path) -> None:
    """A random profile prints a line that makes the very case again where nothing was kept."""
    test = tmp_path / "test_it.py"
    test.write_text(KEPT)
    done = run(tmp_path, HYPOTHESIS_PROFILE="ci")
    [blob] = set(re.findall(r"@reproduce_failure\(.*\)", done.stdout))
    shutil.rmtree(tmp_path / ".hypothesis")
    test.write_text("from hypothesis import reproduce_failure\n" + KEPT.replace("@given", f"{blob}\n@given"))
    again = run(tmp_path, HYPOTHESIS_PROFILE="ci")
    assert (done.returncode, again.returncode) == (1, 1), again.stdout
    assert "number=123_457_211_309" in again.stdout


def test_failure_that_ci_found_comes_up_at_home(tmp_path: Path) -> None:
    """What a `ci` run kept, handed on as an artifact, is tried first where its repository is named, and only there."""
    at_ci, home = tmp_path / "ci", tmp_path / "home"
    for folder in (at_ci, home):
        folder.mkdir()
        (folder / "test_it.py").write_text(KEPT)
    (home / "exactly").touch()
    assert "number=123_457_211_309" in run(at_ci, HYPOTHESIS_PROFILE="ci").stdout
    (home / RECEIVED).mkdir(parents=True)
    stamp = datetime.now(UTC).isoformat().replace(":", "_")
    shutil.make_archive(str(home / RECEIVED / stamp), "zip", at_ci / EXAMPLES)
    assert run(home, HYPOTHESIS_PROFILE="ci").returncode == 0
    assert run(home, HYPOTHESIS_PROFILE="fast", FT_HYPOTHESIS_REPO="owner/name").returncode == 0
    asked = run(home, HYPOTHESIS_PROFILE="ci", FT_HYPOTHESIS_REPO="owner/name")
    assert asked.returncode == 1, asked.stdout
    assert "number=123_457_211_309" in asked.stdout
    assert ARTIFACT in (Path(__file__).parents[2] / ".github" / "workflows" / "tests.yml").read_text()
