"""The whole chain's own behaviour: it removes nothing of anybody's, and ends with all that it has started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.errors import RefusedError
from finetune.verify.chain import MADE, clear_chain, run_chain
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import empty_folder

pytestmark = pytest.mark.tools

STARTS = """
import sys, time
from pathlib import Path
from finetune.verify.chain import _Links
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
links = _Links("reference-llama", Path(), time.monotonic() + 600)
links.process([sys.executable, "-c", child, sys.argv[1]])
"""


@examples(1 / 4)
@given(st.sets(st.sampled_from([*MADE, ".merged.7.part", "thesis.docx", ".git"])))
@example({"chain.json", "run", "thesis.docx"})
@example({"run", "chain.md"})
def test_chain_clears_what_is_a_chains_and_nothing_else(names: set[str]) -> None:
    """Only a folder in which everything is of a chain is cleared; of any other not one file goes."""
    whole = not names or (names <= {*MADE, ".merged.7.part"} and "chain.json" in names)
    with empty_folder() as folder:
        for name in names:
            (folder / name).mkdir() if name in ("run", "merged", ".git") else (folder / name).write_text("{}")
        with contextlib.nullcontext() if whole else pytest.raises(RefusedError, match="no chain"):
            clear_chain(folder)
        assert {path.name for path in folder.iterdir()} == (set() if whole else names)


def test_chain_follows_no_link_out_of_its_folder(tmp_path: Path) -> None:
    """A link in the place of what a chain made goes itself; what it leads to stays."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text(json.dumps({"text": "a"}))
    folder = tmp_path / "chain"
    folder.mkdir()
    (folder / "run").symlink_to(tmp_path / "mine")
    (folder / "chain.json").write_text("{}")
    clear_chain(folder)
    assert (list(folder.iterdir()), len(list((tmp_path / "mine").iterdir()))) == ([], 1)


def test_chain_takes_a_new_or_empty_folder_only(tmp_path: Path) -> None:
    """A file, and a folder with anything in it, are refused by name before a step is taken."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(RefusedError, match=r"is no(t empty| folder)"):
            run_chain("reference-llama", place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="sessions of processes are POSIX's")
def test_chain_that_is_interrupted_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C ends the step that is being taken, too."""
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", STARTS, str(told)], stderr=subprocess.DEVNULL) as ours:
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        number = int(told.read_text())
        ours.send_signal(signal.SIGINT)
        ours.wait(60)
    try:
        assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    finally:
        if psutil.pid_exists(number):
            os.kill(number, signal.SIGKILL)
