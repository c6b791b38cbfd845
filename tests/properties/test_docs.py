"""The pages say what the program does: help, settings and the commands of the README are one with the code."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from finetune.cli.app import app
from finetune.config import KEYS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "tests/README.md")]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The program that writes the reference pages."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "settings.md", "finetune.yaml", "schema.json"])
def test_reference_page_says_what_the_program_says(reference: ModuleType, name: str) -> None:
    """The page is what `make docs` writes today."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run: make docs"


def test_reference_pages_leave_nothing_out() -> None:
    """Every verb and every setting is there, and there are as many as there must be."""
    verbs = re.findall(r"^## ft (\w+)$", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert verbs == [command.name for command in app.registered_commands]
    assert len(verbs) == 15
    listed = re.findall(
        r"^\| `([\w.]+)` \| ", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert listed[: len(KEYS)] == list(KEYS)


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_pages_name_make_targets_that_exist() -> None:
    """Every `make X` of every page is a target, and make help lists every target that a page names."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE))
    named = {
        word
        for page in PAGES
        for text in [*commands_of(page), *re.findall(r"`([^`\n]*)`", page.read_text(encoding="utf-8"))]
        for word in re.findall(r"\bmake ([a-z0-9-]+)", text)
    }
    assert len(named) >= 8
    assert named <= targets


def test_pages_name_files_that_exist() -> None:
    """Every link to a file of the project leads to one."""
    links = [
        page.parent / target
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) >= 5
    assert [link for link in links if not link.exists()] == []


def test_make_help_lists_every_target() -> None:
    """`make help` needs no set-up, and shows each target that says what it does."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE)
    assert [line.split()[0] for line in done.stdout.splitlines()] == targets
    assert len(targets) >= 18
