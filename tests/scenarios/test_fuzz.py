"""Laws of fuzzing: a short part of `make fuzz` ends well, and what ends badly is counted, told, and comes again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
TOOL = Path(__file__).resolve().parents[2] / "bench" / "fuzz.py"
CASES = 25
PLANTED = """
from finetune.cli import console
def broken(*given, **named):
    raise KeyError("planted")
console.print_data = console.print_json = broken
"""


def fuzz(*words: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Its exit code, what it says, and its counts."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, str(TOOL), *words], env=told, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_damaged_input_ends_in_no_traceback_and_in_no_hang() -> None:
    """Whatever is damaged, each command ends within bounds, by an exit code of its own."""
    code, said, counts = fuzz("--seed", "0", "--count", str(CASES))
    assert code == 0, said
    assert counts["cases"] == sum(counts["ends"].values()) == CASES
    assert set(counts["ends"]) <= {f"code {number}" for number in (0, 1, 2, 3, 4, 130)}


UNHIDDEN = """
import finetune.words
finetune.words.without_secrets = lambda text, environ=None: text
"""


def test_no_command_tells_a_secret(tmp_path: Path) -> None:
    """What the environment, the home folder's path, addresses and arguments hold is in no file and no line of any."""
    code, said, counts = fuzz("--sound")
    assert code == 0, said
    assert sum(counts["ends"].values()) == counts["cases"] > 30
    (tmp_path / "sitecustomize.py").write_text(UNHIDDEN)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, _, counts = fuzz("--sound", "--only", str(counts["cases"] - 1), PYTHONPATH=path)
    assert (code, counts["ends"]) == (1, {"a secret was told": 1})


def test_what_ends_badly_is_told_and_comes_again(tmp_path: Path) -> None:
    """A bug that is planted fails the run; the number that is told makes the same case again, alone."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    code, said, counts = fuzz("--seed", "0", "--count", "9", **path)
    assert code == 1
    assert counts["ends"]["traceback"] >= 1
    found = re.search(r"(?m)^(\d+): (ft .*): traceback$", said)
    assert found is not None
    again, said, _ = fuzz("--seed", "0", "--only", found[1], **path)
    assert again == 1
    assert found[0] in said
    assert "KeyError: 'planted'" in said
