"""Laws of exits and of what is shown: any locale, any bytes, no secret, no escape, and no error that hides another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli.console import say
from finetune.errors import StorageError
from finetune.files import write_json
from finetune.run.folder import RunFolder
from finetune.tracking.consumer import Trackers
from finetune.tracking.tracker import Tracked
from finetune.words import in_a_line, without_secrets
from support.workplace import make_data, make_model

pytestmark = pytest.mark.tools
FT = "from finetune.cli import main; main()"
CANARY = "canary-7f3a9c"
QUICK = ("--backend", "reference", "--max-steps", "1", "--rank", "2", "--set", "evaluation.questions=2")
QUICK += ("--set", "judge.control=never", "--set", "judge.memory=never")


def ft(*words: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What `ft` says in a process of its own."""
    command = [sys.executable, "-c", FT, *(word if isinstance(word, bytes) else str(word) for word in words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows whose letters Latin-1 and ASCII do not have."""
    folder = tmp_path_factory.mktemp("orderly")
    make_model(folder / "model")
    make_data(folder / "rows.jsonl", 6)
    return folder


def test_run_ends_in_a_folder_and_on_a_stream_that_are_no_utf8(place: Path) -> None:
    """Nothing fails for the sake of a letter when all is done, and the JSON that is printed can be read."""
    folder = os.fsencode(place) + b"/r\xff"
    given = (*QUICK, "--model", place / "model", "--data", place / "rows.jsonl", "--output", folder, "--json")
    done = ft("train", *given, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode in (0, 1, 4), done.stderr.decode()
    assert os.path.exists(folder + b"/run.json"), done.stderr.decode()
    assert json.loads(done.stdout)["status"] == "complete"
    for encoding in ("ascii", "latin-1", "utf-8"):
        shown = ft("report", folder, PYTHONIOENCODING=encoding)
        assert b"Traceback" not in shown.stderr, shown.stderr.decode()
        assert shown.stdout


def test_page_is_drawn_whatever_backend_matplotlib_is_told(place: Path) -> None:
    """A name that nobody knows in MPLBACKEND, which is for windows, ends no command."""
    draws = "import os; from finetune.report.ink import sheet; sheet(9, 9).__enter__(); print(os.environ['MPLBACKEND'])"
    done = subprocess.run(
        [sys.executable, "-c", draws], env=os.environ | {"MPLBACKEND": "nobody"}, capture_output=True, check=False
    )
    assert done.stdout.strip() == b"nobody", done.stderr.decode()


def test_terminated_command_says_that_it_was_interrupted(place: Path) -> None:
    """SIGTERM is Ctrl-C: the exit code, the word, and no child that outlives it."""
    command = [sys.executable, "-c", FT, "train", *QUICK[:2], "--model", str(place / "model")]
    command += [
        "--data",
        str(place / "rows.jsonl"),
        "--output",
        str(place / "ended"),
        "--rank",
        "2",
        "--epochs",
        "99999",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    events = place / "ended" / "events.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (events.exists() and b"StepDone" in events.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told.decode()
    assert b"interrupted" in told
    assert b"ft train --resume" in told


@given(st.text(), st.sampled_from(["\x1b]0;x\x07", "\u202e", "\x9b", "\x7f", "\ud800"]))
def test_no_control_character_acts(text: str, evil: str) -> None:
    """What is shown has none but tabs and ends of lines, and what has none is shown as it is."""
    shown = in_a_line(text + evil + "end")
    assert all(letter.isprintable() or letter in "\t\n" or letter not in evil for letter in shown)
    assert not set(evil) & set("\x1b\x07\u202e\x9b\x7f\ud800") & set(shown)
    assert in_a_line(f"plain {text!a}") == f"plain {text!a}"


def test_what_is_said_holds_no_secret_and_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    """Logins in addresses, keys that are asked with and secrets of the environment are left out, escapes are shown."""
    with patch.dict(os.environ, {"MY_API_KEY": CANARY, "HF_TOKEN": f"hf_{CANARY}"}):
        say(f"\x1b[2J http://me:{CANARY}@host/a?token={CANARY}&b=1 and {CANARY} hf_{CANARY}")
    said = capsys.readouterr().err
    assert CANARY not in said
    assert "\x1b" not in said
    assert "http://***@host/a?token=***&b=1" in said
    assert without_secrets(f"data file https:/me:{CANARY}@host/a is", {}) == "data file https:/***@host/a is"
    kept = "http://host:80/a?b=1 me@host a@b: c://d /a:/b c:/d"
    assert without_secrets(kept, {"TOKEN": "1", "PATH": "http://host"}) == kept


class Leaky:
    """A tracker whose address has a password, and whose error has it, too."""

    def __init__(self, tracked: Tracked) -> None:
        self.place, self.last_step = f"http://me:{CANARY}@host:5000, experiment x", -1

    def log(self, step: int, numbers: Any) -> None:
        """Fail."""

    def finish(self, *given: Any, **more: Any) -> None:
        """Fail with the address."""
        raise OSError(f"cannot reach http://me:{CANARY}@host:5000/api")


def test_tracking_servers_password_is_in_no_record(tmp_path: Path) -> None:
    """Nor is it in what is told of a failure."""
    told: list[Any] = []
    with patch("finetune.tracking.consumer.open_tracker", lambda name, tracked: Leaky(tracked)):
        trackers = Trackers(["mlflow"], Tracked("id", "name", "project", tmp_path, {}), told.append)
        trackers.close(complete=True)
    found = str([trackers.places(), trackers.notes(), told])
    assert CANARY not in found
    assert "http://***@host:5000, experiment x" in found
    assert "cannot reach http://***@host:5000/api" in found


@pytest.mark.parametrize("text", ["r\udcff", "\ud83d", "é✓"])
def test_json_is_written_whatever_the_letters(text: str, tmp_path: Path) -> None:
    """Halves of letters come back as they were."""
    write_json(tmp_path / "a.json", {"a": text})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": text}


def test_letting_go_hides_no_error_of_the_disk(tmp_path: Path) -> None:
    """The error that ended the run is told, not that the lock's file could not be removed; tidying tells its own."""
    run = RunFolder(tmp_path)
    run.claim()
    run.report_page.touch()
    with patch.object(Path, "unlink", side_effect=OSError(30, "Read-only file system", "x")):
        with pytest.raises(StorageError, match="Read-only file system"):
            run.tidy()
        run.release()
    run.claim()
    run.release()
