"""What begins with the libraries imported is a process like any other."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from support.processes import ft
from support.sessions import need
from support.warm import WarmStarts, warm_starts

pytestmark = pytest.mark.tier2
need("torch")
TELL = """
import json, os, sys
first = not hasattr(sys.modules["torch"], "seen")
sys.modules["torch"].seen = True
ours = [name for name in sys.modules if name.startswith(("finetune", "support"))]
told = [os.getcwd(), os.environ.get("OLLAMA_HOST"), sys.argv[1:], sys.stdin.read()]
print(json.dumps([os.getpid(), first, ours, *told]))
print("a word", file=sys.stderr)
sys.exit(3)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def starts() -> WarmStarts:
    """Those of this session."""
    found = warm_starts(ENVIRONMENT)
    if found is None:
        pytest.skip("processes are forked on Linux alone: run it there")
    return found


def test_warm_process_is_one_of_its_own(starts: WarmStarts, tmp_path: Path) -> None:
    """It has its own folder, environment, arguments and streams, nothing of ours, and nothing of the one before."""
    environment, numbers = {**ENVIRONMENT, "OLLAMA_HOST": "there"}, set()
    for given in ("one", "two"):
        done = starts.run(TELL, given, cwd=tmp_path, environment=environment, given=f"said {given}", timeout=60)
        number, *told = json.loads(done.stdout)
        assert told == [True, [], str(tmp_path), "there", [given], f"said {given}"]
        assert (done.returncode, done.stderr) == (3, "a word\n")
        numbers.add(number)
    assert len(numbers) == 2


def test_warm_process_that_is_late_or_killed_is_told(starts: WarmStarts, tmp_path: Path) -> None:
    """One that takes too long is ended and told, one that is killed says by what; the next begins as ever."""
    with pytest.raises(subprocess.TimeoutExpired):
        starts.run("import time; time.sleep(60)", cwd=tmp_path, environment=ENVIRONMENT, timeout=0.3)
    done = starts.run("import os; os.kill(os.getpid(), 15)", cwd=tmp_path, environment=ENVIRONMENT, timeout=60)
    assert done.returncode == -15
    assert starts.run("1 / 0", cwd=tmp_path, environment=ENVIRONMENT, timeout=60).returncode == 1


def test_process_of_another_environment_is_not_warm(starts: WarmStarts, tmp_path: Path) -> None:
    """What a library reads as it is imported must be the same; started the long way, `ft` says the same."""
    assert warm_starts({**ENVIRONMENT, "HF_HOME": "elsewhere"}) is None
    warm, cold = (ft("check", "--model", "nothing/here", cwd=tmp_path, fresh=fresh) for fresh in (False, True))
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
