"""Laws of `ft verify`, `ft prove` and `ft replay` as commands: what they refuse, leave behind, and tell to do next."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.cli.app import run
from finetune.verify.subjects.subject import About

pytestmark = pytest.mark.tools
LAW = "mask.answers"


class Forgetful:
    """A trainer in this process that loses every row."""

    about = About("a forgetful trainer", {"forgetful": "1.0"}, {"tokenize": ""})

    def ask(self, ability: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """No rows."""
        return {"rows": []}

    def close(self) -> None:
        """There is nothing to end."""


FT = "import sys; from finetune.cli.app import run; sys.exit(run(sys.argv[1:]))"
HERE = f"{__name__}:Forgetful"


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """The folder of what was found of a trainer that breaks one law, with a blank in its name."""
    folder = tmp_path / "what was found"
    assert run(["verify", "--subject", HERE, "--law", LAW, "--output", str(folder)]) == 1
    return folder


def test_finding_is_had_again_by_the_line_in_its_report(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that a report names is one, whatever the folder is called, and shows the same break."""
    [line] = [line for line in (found / f"{LAW}.md").read_text().splitlines() if line.startswith("Once more: ")]
    words = shlex.split(line.partition("`")[2].rstrip("`"))
    capsys.readouterr()
    assert words[0] == "ft"
    assert run(words[1:]) == 1
    assert capsys.readouterr().out.startswith(f"failed: {HERE}")


def test_findings_of_an_earlier_run_are_named(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What this run did not find, and lies where it writes, is told, and nothing of it is harmed."""
    before = (found / f"{LAW}.json").read_bytes()
    old = found / "mask.cut.json"
    old.write_bytes(before)
    capsys.readouterr()
    assert run(["verify", "--subject", HERE, "--law", LAW, "--output", str(found)]) == 1
    assert "findings of an earlier run, which are none of this one: mask.cut.json" in capsys.readouterr().err
    assert old.read_bytes() == before


def test_known_findings_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `--json` printed is a baseline: what failed then is named in a line; of another's nothing is known."""
    words = ["verify", "--subject", HERE, "--exclude", "protocol.alike", "--law", LAW]
    assert run([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["laws"][0]["severity"], told["known"]) == ("wrong learning", [])
    file = tmp_path / "known.json"
    file.write_text(json.dumps(told))
    # Nothing else was judged, so that nothing is green; but nothing is called new either.
    assert run([*words, "--baseline", str(file)]) == 1
    shown = capsys.readouterr().out
    assert f"known from the baseline: {LAW}\n" in shown
    assert "FAILED" not in shown
    file.write_text(json.dumps({**told, "subject": "somebody"}))
    assert run([*words, "--baseline", str(file)]) == 1
    said = capsys.readouterr()
    assert "nothing in it counts as known" in said.err
    assert f"FAILED {LAW} (wrong learning): " in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "--subject", "reference", "--python", "x"], "'reference' is asked by this very interpreter"),
        (["verify", "--subject", HERE, "--python", "x"], "is asked by this very interpreter"),
        (["verify", "--subject", "reference", "--law", "learning.by_heart"], "say --tier 2"),
        (["replay", "FINDING", "--subject", "reference", "--python", "x"], "is asked by this very interpreter"),
    ],
    ids=["python of ours", "python of a class", "law of a higher tier", "python of a replay"],
)
def test_option_that_does_nothing_is_refused(
    words: list[str], said: str, found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No option is passed over in silence: what it cannot do is said, and what to do instead."""
    files = {"FINDING": str(found / f"{LAW}.json")}
    capsys.readouterr()
    assert run([files.get(word, word) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_faults_are_listed_as_json_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """`--list --json` is JSON."""
    assert run(["prove", "--list", "--json", "--fault", "A027"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert (told["fault"], told["slug"]) == ("A027", "data.last_batch_dropped")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "words",
    [["verify", "--subject", "reference"], ["prove", "--seeds", "1", "--jobs", "1", "--output", "proof"]],
    ids=["verify", "prove"],
)
def test_command_that_is_ended_leaves_nothing(words: list[str], sign: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM ends it as Ctrl-C does: with 130, no process that runs on, and no file of its own anywhere."""
    own = tmp_path / "own"
    own.mkdir()
    memory = Path("/dev/shm")
    before = set(memory.iterdir()) if memory.is_dir() else set()
    command = [
        sys.executable,
        "-c",
        "import sys; from finetune.cli.app import run; sys.exit(run(sys.argv[1:]))",
        *words,
    ]
    environment = {**os.environ, "TMPDIR": str(own)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        latest = time.monotonic() + 60
        while not (children := watched.children(recursive=True)):
            assert time.monotonic() < latest
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(sign)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert sorted(own.iterdir()) == []
    left = set(memory.iterdir()) - before if memory.is_dir() else set()
    assert [path for path in left if path.name.startswith("finetune-prove-")] == []
