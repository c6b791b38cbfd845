"""Laws of what others call: the GitHub action reads no input as a command, and its page says what it does."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune.cli.app import app

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = """a b; touch owned $(touch owned) `touch owned` "' && touch owned"""


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    """The action as GitHub reads it."""
    found = yaml.load((ROOT / "action.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    assert isinstance(found, dict)
    return found


def words_of(action: dict[str, Any], inputs: dict[str, str], folder: Path) -> list[str]:
    """What `ft` is called with when the action runs its laws with these inputs, a program of that name in its place."""
    [step] = [step for step in action["runs"]["steps"] if step.get("id") == "verify"]
    given = {name: value.get("default", "") for name, value in action["inputs"].items()} | inputs
    contexts = {f"inputs.{name}": value for name, value in given.items()} | {"runner.temp": str(folder / "kept")}
    (folder / "ft").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" > words\n", encoding="utf-8")
    (folder / "ft").chmod(0o755)
    told = {
        name: re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda found: contexts[found[1]], value)
        for name, value in step["env"].items()
    }
    environment = {**told, "PATH": f"{folder}:/usr/bin:/bin", "GITHUB_OUTPUT": str(folder / "outputs")}
    subprocess.run(["bash", "-c", step["run"]], cwd=folder, env=environment, check=True, timeout=60)
    return (folder / "words").read_text(encoding="utf-8").split("\0")[:-1]


def test_action_hands_on_every_input_as_it_is(action: dict[str, Any], tmp_path: Path) -> None:
    """An input is one word of the command whatever is in it, more options are words of their own; nothing is run."""
    given = {"subject": HOSTILE, "tier": "2", "profile": "*", "args": "--json  --seed=$(touch owned)"}
    words = words_of(action, given, tmp_path)
    kept = tmp_path / "kept" / "finetune-verify"
    files = ["--junit", f"{kept}/junit.xml", "--sarif", f"{kept}/findings.sarif", "--summary", f"{kept}/summary.md"]
    more = ["--json", "--seed=$(touch", "owned)"]
    assert words == ["verify", "--subject", HOSTILE, "--tier", "2", "--profile", "*", *files, *more]
    assert not (tmp_path / "owned").exists()
    outputs = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert outputs == {"junit": files[1], "sarif": files[3]}


@pytest.mark.parametrize("written", [True, False])
def test_action_shows_the_table_on_the_page_of_the_job(action: dict[str, Any], tmp_path: Path, written: bool) -> None:
    """Also when laws failed, what `ft verify` wrote is added to the job's summary; where nothing was, nothing is."""
    [step] = [step for step in action["runs"]["steps"] if "GITHUB_STEP_SUMMARY" in step.get("run", "")]
    assert step["if"] == "always()"
    summary = tmp_path / "summary"
    summary.write_text("before\n")
    if written:
        (tmp_path / "summary.md").write_text("| law |\n")
    environment = {"PATH": "/usr/bin:/bin", "FT_KEPT": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary)}
    subprocess.run(["bash", "-c", step["run"]], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert summary.read_text() == "before\n" + "| law |\n" * written


def test_action_calls_what_ft_knows(action: dict[str, Any], tmp_path: Path) -> None:
    """With nothing but a subject, the command line is one that `ft` takes."""
    group: Any = typer.main.get_command(app)
    verb, *words = words_of(action, {"subject": "reference"}, tmp_path)
    group.commands[verb].make_context(verb, words)


def test_action_trusts_nobody_more_than_it_must(action: dict[str, Any]) -> None:
    """No shell text has an expression in it, every input is used, and every action of others is one fixed commit."""
    steps = action["runs"]["steps"]
    assert [step["name"] for step in steps if "${{" in step.get("run", "")] == []
    assert [step["uses"] for step in steps if not re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + "0" * 40))] == []
    used = set(re.findall(r"\$\{\{ inputs\.(\w+) \}\}", str(steps)))
    assert used == set(action["inputs"])
    assert len(used) >= 7


def test_action_page_says_what_the_action_takes(action: dict[str, Any]) -> None:
    """The page has every input with its default, and no other."""
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", page, re.MULTILINE))
    defaults = {name: value.get("default", "") for name, value in action["inputs"].items()}
    assert rows == {name: f"`{default}`" if default else "" for name, default in defaults.items()}
