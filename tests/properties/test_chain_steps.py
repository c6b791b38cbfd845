"""Laws of the whole chain: what cannot be done is skipped with the reason, what fails is told, and the rest goes on."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune.errors import FineTuneError, RefusedError
from finetune.verify import chain
from finetune.verify.chain import run_chain

pytestmark = pytest.mark.tools


def test_chain_goes_on_where_it_can(tmp_path: Path) -> None:
    """Without a model nothing is trained: that step fails, what needs it is skipped by its name, the rows are there."""
    told: list[str] = []
    found = run_chain(str(tmp_path / "no-model"), tmp_path / "chain", tell=told.append)
    outcomes = {step.name: step.outcome for step in found.steps}
    assert [name for name, outcome in outcomes.items() if outcome == "failed"] == ["model"]
    assert [name for name, outcome in outcomes.items() if outcome == "done"] == ["data set"]
    assert "does not exist" in found.step("model").why
    assert found.step("fine-tuning").why == "it needs the step 'model', which was failed"
    assert found.step("Ollama").why == "it needs the step 'GGUF', which was skipped"
    written = json.loads((tmp_path / "chain" / "chain.json").read_text())
    assert (written["done"], written["skipped"], written["failed"]) == (1, 9, 1)
    assert len(told) == len(outcomes) == 11
    # A model that nobody ships knows none of the answers, so all hundred are to be learned.
    assert len((tmp_path / "chain" / "questions.jsonl").read_text().splitlines()) == 100


def test_chain_writes_into_no_folder_of_others(tmp_path: Path) -> None:
    """A folder with anything in it is refused, and left alone."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty"):
        run_chain("reference-llama", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


SAYS = "import sys; print('error: it broke', file=sys.stderr); sys.exit({})"
PROGRAMS = {
    "refused": (SAYS.format(3), RefusedError, "it broke"),
    "failed": (SAYS.format(1), FineTuneError, "it broke"),
    "without a word": ("raise SystemExit(1)", FineTuneError, "ended with 1"),
}
SLEEPS = "import time; time.sleep(99)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); {SLEEPS}"


@pytest.mark.parametrize("how", PROGRAMS)
def test_chain_tells_how_a_program_ended(how: str, tmp_path: Path) -> None:
    """A program that refuses is a step that is skipped; one that fails is quoted."""
    code, kind, words = PROGRAMS[how]
    links = chain._Links("x", tmp_path, time.monotonic() + 60)
    with pytest.raises(kind, match=words) as caught:
        links.process([sys.executable, "-c", code])
    assert isinstance(caught.value, RefusedError) == (how == "refused")


def test_chain_ends_what_takes_too_long_and_its_children(tmp_path: Path) -> None:
    """When the time is over, a program and all that it has started are gone, and that is told."""
    links = chain._Links("x", tmp_path, time.monotonic())
    before = set(children())
    with pytest.raises(FineTuneError, match="was stopped: the chain has"):
        links.process([sys.executable, "-c", PARENT])
    deadline = time.monotonic() + 30
    while set(children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(children()) - before == set()


def children() -> list[psutil.Process]:
    """What this process has started and what that has; other tests may keep some for the whole session."""
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found
