"""The pages say what the program does: help, settings and the commands of the README are one with the code."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from finetune.cli.app import app
from finetune.config import KEYS
from finetune.verify.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
DEFINED = re.compile(r"^def (test_\w+)", re.MULTILINE)
PAGES = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "tests/README.md")), *DOCS]


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    """The program that writes the reference pages; as for a program, its own folder is searched first."""
    sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "docs"))


def test_reference_pages_say_what_the_program_says(reference: ModuleType) -> None:
    """Each of at least 4 pages is what `make docs` writes today."""
    assert {"commands.md", "settings.md", "finetune.yaml", "schema.json"} <= set(reference.PAGES)
    there = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in reference.PAGES}
    assert [name for name in reference.PAGES if there[name] != reference.written(name)] == [], "run: make docs"


def test_shares_are_written_in_one_way() -> None:
    """In every text of over 300 that a user can see a share is `5%`, without a blank; `%` of code stands elsewhere."""
    texts = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "docs" / "suite_pages.py"]
    texts += [path for ending in ("*.py", "*.j2", "*.md") for path in sorted((ROOT / "src").rglob(ending))]
    assert len(texts) > 300
    blank = re.compile(r"[0-9}][ \u00a0\u2009\u202f]%(?![}%]| \d)")
    assert [f"{path.name}: {found[0]}" for path in texts if (found := blank.findall(path.read_text("utf-8")))] == []


def listed(nav: list[Any]) -> list[str]:
    """The pages of the site's menu, in its order."""
    parts = [value for entry in nav for value in entry.values()]
    return [page for part in parts for page in ([part] if isinstance(part, str) else listed(part))]


def test_promises_are_held_by_what_exists() -> None:
    """Behind each promise of the threat model stands a law of the catalogue or a test, by its name."""
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [A-Z].* \| (`.*) \|$", text, re.MULTILINE)
    assert len(rows) > 15
    tests = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text("utf-8"))}
    known = tests | catalogue().keys()
    assert [name for row in rows for name in re.findall(r"`([^`]*)`", row) if name not in known] == []


def test_site_lists_every_page_once() -> None:
    """Each of at least 25 pages in docs/ is in the site's menu once, and the site fails for whatever leads nowhere."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert len(DOCS) >= 25
    assert sorted(listed(site["nav"])) == [page.name for page in DOCS]
    rules = [rule for group in site["validation"].values() for rule in group.values()]
    assert (len(rules), set(rules), site["strict"]) == (7, {"warn"}, True)


def test_reference_pages_leave_nothing_out() -> None:
    """Every verb and every setting is there, and there are as many as there must be."""
    verbs = re.findall(r"^## ft (\w+)$", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert verbs == [command.name for command in app.registered_commands]
    assert len(verbs) == 19
    listed = re.findall(r"^### `([\w.]+)` {", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(KEYS)


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


def calls_of(page: Path) -> list[list[str]]:
    """Every call of ft that a page shows in a block of its own, as verb and options."""
    lines = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?ft ([a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [[words[0], *(word for word in words if word.startswith("--"))] for words in map(str.split, lines)]


def test_pages_call_verbs_and_options_that_exist() -> None:
    """Each of at least 25 calls of ft is one of its verbs with its options; a verb that is missing is said to be."""
    group: Any = typer.main.get_command(app)
    known = {name: {word for one in verb.params for word in one.opts} for name, verb in group.commands.items()}
    calls = [(page, call) for page in PAGES for call in calls_of(page)]
    assert len(calls) >= 25
    for page, (verb, *options) in calls:
        missing = bool(re.search(rf"`ft {verb}`[^.]*not in this version", page.read_text(encoding="utf-8")))
        assert missing != (verb in known), f"{page.name}: ft {verb}"
        assert missing or set(options) <= known[verb], f"{page.name}: ft {verb} {options}"


def test_pages_name_files_that_exist() -> None:
    """Every link to a file of the project leads to one."""
    links = [
        page.parent / target
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) >= 5
    assert [link for link in links if not link.exists()] == []


def test_pages_name_tests_that_exist() -> None:
    """Each test that the page on data names stands behind a cell of its table, and is there."""
    named = set(re.findall(r"`(test_[a-z_]+)`", (ROOT / "docs" / "data.md").read_text(encoding="utf-8")))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 9
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_make_help_lists_every_target() -> None:
    """`make help` needs no set-up, and shows each target that says what it does."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE)
    assert [line.split()[0] for line in done.stdout.splitlines()] == targets
    assert len(targets) >= 18
