"""Runs the examples of a page as its reader would, one after another in one folder, and holds them to what is shown.

- A block with a title is a file of that name.
- In a `console` block each line that begins with `$ ` is a command; what follows is its standard output, or, of a
  command that has none, its standard error. It ends with 0 unless `$ echo $?` comes next and shows another code.
- `^C` below some lines interrupts the command once the line above it has come.
- A `python` block is run; a `text` block right after it is what it prints.
- The `python3` blocks of a page are the cells of one notebook: they share their names, and what a cell's last line is
  worth is shown as well, after what the cell prints.
- `...` on a line of its own stands for any lines, and within a line for any letters.

All other blocks are for reading only.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
HERE = Path(sys.executable)
PROGRAMS = {"ft", "cmp", "ls", "pre-commit", "git"}
"""What an example may call."""
PATIENCE = 300
CELLS = """
import ast, sys
names = {"__name__": "__main__"}
for cell in sys.argv[1:]:
    *lines, last = ast.parse(cell).body
    lines += [] if isinstance(last, ast.Expr) else [last]
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    worth = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
    if worth is not None:
        print(worth._repr_html_() if hasattr(worth, "_repr_html_") else repr(worth))
"""
"""Runs the cells of a notebook that are its arguments, and prints what a notebook would show."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code: its language, the file that it is, and its text."""

    language: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """Something to run, what is shown of what it says, and the exit code that is shown."""

    words: tuple[str, ...]
    shown: str
    code: int = 0


def blocks(page: Path) -> list[Block]:
    """Every block of a page; a fence that cannot be told is an error, for what stands there would never be run."""
    text = page.read_text(encoding="utf-8")
    found = [Block(*parts) for parts in FENCE.findall(text)]
    fences = len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{page.name}: {fences} fences, and {len(found)} blocks of them"
    return found


def examples(page: Path) -> Iterator[Block | Example]:
    """What is to be done, in the page's order: files to write, and programs to run."""
    told = [*blocks(page), Block("", "", "")]
    cells = [(block.text, _said(after)) for block, after in pairwise(told) if block.language == "python3"]
    if cells:
        texts, shown = zip(*cells, strict=True)
        yield Example(("python", "-c", CELLS, *texts), "".join(shown))
    for block, after in pairwise(told):
        if block.title:
            yield block
        elif block.language == "console":
            yield from _session(block.text)
        elif block.language == "python":
            yield Example(("python", "-c", block.text), _said(after))


def _said(after: Block) -> str:
    return after.text if after.language == "text" and not after.title else "...\n"


def _session(text: str) -> Iterator[Example]:
    before, *parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not before, f"a console block begins with a command, not with {before!r}"
    for part, after in pairwise([*parts, ""]):
        command, _, shown = part.partition("\n")
        if command != "echo $?":
            code = int(after.partition("\n")[2]) if after.startswith("echo $?\n") else 0
            yield Example(tuple(shlex.split(command)), shown, code)


def play(page: Path, folder: Path, python: Path) -> int:
    """Do all that a page shows with the programs beside this Python, and tell how many were run."""
    count = 0
    for example in examples(page):
        if isinstance(example, Block):
            path = folder / example.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(example.text, encoding="utf-8")
            continue
        count += 1
        said, code = _run(example, folder, python)
        assert code == example.code, f"{page.name}: {example.words} ended with {code}, not {example.code}\n{said}"
        assert agrees(example.shown.replace("\n^C\n", "\n...\n"), said), (
            f"{page.name}: {shlex.join(example.words)}\n--- shown\n{example.shown}\n--- said\n{said}"
        )
    return count


def agrees(shown: str, said: str) -> bool:
    """Whether a program said what is shown and nothing else; what is left out, and blanks that end a line, aside."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else r".*?".join(map(re.escape, line.rstrip().split("..."))) + r"\n"
        for line in shown.splitlines()
    )
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in said.splitlines())) is not None


def user(python: Path = HERE, **more: str) -> dict[str, str]:
    """A user's environment: our programs, no colours, no network, and of our own switches only those that are given.

    The programs beside `python` come before those of the environment that runs the tests; in another one than that
    nothing is found by a variable.
    """
    others = ("FT_", "GIT_") if python == HERE else ("FT_", "GIT_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    places = (str(python.parent), str(HERE.parent), os.environ.get("PATH", os.defpath))
    return {**kept, **quiet, "PATH": os.pathsep.join(places), **more}


def _run(example: Example, folder: Path, python: Path) -> tuple[str, int]:
    program = example.words[0]
    assert program in PROGRAMS | {"python"}, f"{program} is no program that an example may call"
    lines = example.shown.splitlines()
    # Its words go to files: what is waited for may then come whenever it likes, and no pipe can be full.
    out, err = folder / ".out", folder / ".err"
    with out.open("w+", encoding="utf-8") as said, err.open("w+", encoding="utf-8") as told:
        process = subprocess.Popen(example.words, cwd=folder, env=user(python), stdout=said, stderr=told)
        try:
            if "^C" in lines:
                _wait_for(lines[lines.index("^C") - 1], err, process)
                process.send_signal(signal.SIGINT)
            code = process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
    words = out.read_text(encoding="utf-8") or err.read_text(encoding="utf-8")
    out.unlink()
    err.unlink()
    return words, code


def _wait_for(line: str, told: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until a program has said a line; an error where it ends without."""
    while line not in told.read_text(encoding="utf-8").splitlines():
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"it ended with {process.returncode} before it said {line!r}")
