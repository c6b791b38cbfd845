"""What is said of other trainers: each broken law has its cause or the reason why it is none, each cause a script."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence"
FOUND: dict[str, Any] = yaml.safe_load((EVIDENCE / "causes.yaml").read_text(encoding="utf-8"))
RUNS = [(path.parent.name, json.loads(path.read_text(encoding="utf-8"))) for path in EVIDENCE.glob("*/verif*.json")]
SCRIPTS = {cause["script"]: cause for cause in FOUND["causes"]}


def test_each_broken_law_has_a_cause_or_a_reason() -> None:
    """What is broken in what was run, and nothing else, is told: as a finding, or as none, and never as both."""
    broken = {(name, each["law"]) for name, run in RUNS for each in run["laws"] if each["outcome"] == "failed"}
    told = {(name, law) for cause in FOUND["causes"] for name, laws in cause["laws"].items() for law in laws}
    none = [(name, law) for kind in FOUND["beside"].values() for name, laws in kind["laws"].items() for law in laws]
    assert len(broken) >= 55
    assert told | set(none) == broken
    assert len(none) == len(set(none))
    assert told.isdisjoint(none)


def test_each_script_is_short_and_uses_no_code_of_ours() -> None:
    """A maintainer reads a script whole: thirty lines at most, of their own interface alone."""
    paths = sorted((EVIDENCE / "scripts").iterdir())
    assert [path.stem for path in paths] == sorted(SCRIPTS)
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 30, path.name
        assert "finetune" not in text, path.name


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, list[str]]]:
    """What the scripts of a component print, each by its name; they share a process, since to start one takes long."""

    @cache
    def lines_of(component: str) -> dict[str, list[str]]:
        names = [name for name, cause in SCRIPTS.items() if cause["component"] == component]
        paths = [str(EVIDENCE / "scripts" / f"{name}.py") for name in names]
        run = "import runpy, sys\nfor path in sys.argv[1:]:\n    print('== ')\n    runpy.run_path(path)"
        # Of deprecations Python itself tells no user, and libraries below the component have many as they are imported.
        shown = ["-W", "always", "-W", "ignore::DeprecationWarning"]
        command = [sys.executable, *shown, "-u", "-c", run, *paths]
        place = tmp_path_factory.mktemp("scripts")
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=place, text=True, check=True, **both)
        said = [part.splitlines() for part in done.stdout.split("== \n")[1:]]
        return dict(zip(names, said, strict=True))

    return lines_of


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_prints_what_the_page_says(name: str, printed: Callable[[str], dict[str, list[str]]]) -> None:
    """With the versions that the page names, the script of a cause prints what is told of it, and no other warning."""
    versions = {library: number for _, run in RUNS for library, number in run["versions"].items()}
    component = SCRIPTS[name]["component"]
    library = component.lower()
    try:
        here = version(library)
    except PackageNotFoundError:
        pytest.skip(f"needs {library}: pip install {library}=={versions[library]}")
    if here != versions[library]:
        pytest.skip(f"the page speaks of {library} {versions[library]}; {here} is installed")
    told = [line for line in printed(component)[name] if line.startswith(("expected: ", "got: "))]
    assert [line.partition(": ")[0] for line in told] == ["expected", "got"]
    assert told[-1] == f"got: {SCRIPTS[name]['got']}"
    warned = [line for line in printed(component)[name] if "warning" in line.lower() and line not in told]
    assert warned == [] or "warning" in SCRIPTS[name]["told"]
