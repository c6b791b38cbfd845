"""Laws of a run's last lines, in real runs: its cases are counted, and its failures come again by the command told."""

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings

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
FAILING = """
import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
def tell(name, number):
    with open(f"told-{name}", "a") as file:
        print(number, file=file)
    assert number < 1000
@pytest.mark.parametrize("word", ["it's; a 'b'", "$HOME *"])
@given(number=st.integers(0, 2**64))
def test_number(word, number):
    tell(word, number)
class Machine(RuleBasedStateMachine):
    @rule(number=st.integers(0, 2**64))
    def add(self, number):
        tell("machine", number)
test_machine = Machine.TestCase
"""
KEPT = """
from pathlib import Path
from hypothesis import given, strategies as st
@given(st.integers(0, 2**64))
def test_number(number):
    assert number != 123_457_211_309 if Path("exactly").exists() else number < 123_457_211_309
"""
TELLING = """
from hypothesis import given, strategies as st
@given(st.integers(-9999, 9999), st.text(max_size=9), st.floats())
def test_told(number, text, floating):
    with open("told", "a") as file:
        print(repr((number, text, floating)), file=file)
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


CASES = settings.get_profile("fast").max_examples


@pytest.mark.parametrize("workers", ["0", "2"])
def test_cases_of_all_workers_are_counted_together(workers: str, tmp_path: Path) -> None:
    """The sum is that of all tests, whichever process ran them; too small a sum fails the run that asked for more."""
    for number in range(2):
        (tmp_path / f"test_{number}.py").write_text(TWO_LAWS)
    done = run(tmp_path, "-n", workers, "--least-cases", str(4 * CASES))
    assert done.returncode == 0, done.stdout
    assert f"Hypothesis generated {4 * CASES} cases in 4 tests (profile fast)" in done.stdout
    short = run(tmp_path, "-n", workers, "--least-cases", str(4 * CASES + 1))
    assert short.returncode == 1
    assert f"fewer than the {4 * CASES + 1} asked for" in short.stdout


def told(folder: Path) -> dict[str, list[str]]:
    """Every number that each law was given, in order; forgotten when told."""
    files = sorted(folder.glob("told-*"))
    numbers = {file.name: file.read_text().split() for file in files}
    for file in files:
        file.unlink()
    return numbers


@pytest.mark.parametrize("profile", ["fast", "ci"])
def test_failure_comes_again_by_the_command_told(profile: str, tmp_path: Path) -> None:
    """Each command that a run tells, given to a shell where nothing was kept, makes the very same cases and fails."""
    (tmp_path / "test_it.py").write_text(FAILING)
    (tmp_path / "test_other.py").write_text("import finetune.config, finetune.report.numbers\n" + TWO_LAWS)
    done = run(tmp_path, "-n", "2", HYPOTHESIS_PROFILE=profile)
    commands = re.findall(r"^replay: (.*)$", done.stdout, re.MULTILINE)
    assert (done.returncode, len(commands)) == (1, 3), done.stdout
    first, again = told(tmp_path), {}
    assert [len(numbers) > 10 for numbers in first.values()] == [True] * 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        shutil.rmtree(tmp_path / ".hypothesis", ignore_errors=True)
        assert f"HYPOTHESIS_PROFILE={profile} " in command
        assert ("--hypothesis-seed" in command) == (profile == "ci")
        shell = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert shell.returncode == 1, shell.stdout
        assert f"replay: {command}" in shell.stdout
        again |= told(tmp_path)
    assert again == first


def test_cases_do_not_depend_on_what_else_is_imported(tmp_path: Path) -> None:
    """A law's cases are the same alone and among tests that have imported more of the product."""
    (tmp_path / "test_told.py").write_text(TELLING)
    (tmp_path / "test_a.py").write_text(
        "import finetune.config, finetune.criteria.validator, finetune.data.facts\n" + TWO_LAWS
    )
    run(tmp_path, "test_told.py")
    alone = (tmp_path / "told").read_text()
    (tmp_path / "told").unlink()
    run(tmp_path)
    assert (tmp_path / "told").read_text() == alone
    assert len(alone.splitlines()) == CASES


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
    # It came from what was kept, and of that the seed knows nothing.
    assert "replay: HYPOTHESIS_PROFILE=ci FT_HYPOTHESIS_REPO=owner/name " in asked.stdout
    assert "--hypothesis-seed" not in asked.stdout
    assert ARTIFACT in (Path(__file__).parents[2] / ".github" / "workflows" / "tests.yml").read_text()


def test_observations_are_written_when_asked_for(tmp_path: Path) -> None:
    """One line for each case lies where the documents say, and none when nobody asked."""
    (tmp_path / "test_it.py").write_text(TWO_LAWS)
    observed = tmp_path / ".hypothesis" / "observed"
    run(tmp_path)
    assert not observed.exists()
    done = run(tmp_path, HYPOTHESIS_EXPERIMENTAL_OBSERVABILITY="1")
    assert done.returncode == 0, done.stdout
    [file] = observed.glob("*_testcases.jsonl")
    assert len(file.read_text().splitlines()) >= 2 * CASES
