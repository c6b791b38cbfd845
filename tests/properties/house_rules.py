"""Reads a source tree and lists what breaks the rules of the house; works on any tree of that layout.

Only import statements are read: a module named in a string, as for a child process, is not an import.
"""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

RANKS = {
    "errors": 0,
    "records": 0,
    "ports": 0,
    "events": 1,
    "config": 1,
    "children": 1,
    "runtime": 1,
    "intervals": 1,
    "place": 1,
    "resident": 1,
    "interrupts": 1,
    "data": 2,
    "templates": 2,
    "tokens": 2,
    "models": 2,
    "training": 2,
    "artifacts": 2,
    "evaluation": 2,
    "criteria": 2,
    "memory": 2,
    "report": 2,
    "tracking": 2,
    "convert": 2,
    "deploy": 2,
    "backends": 3,
    "assembly": 3,
    "pipeline": 4,
    "reopen": 4,
    "export": 4,
    "merging": 4,
    "equivalence": 4,
    "deployment": 4,
    "launch": 4,
    "reference_model": 4,
    "verify": 4,
    "cli": 5,
}
FRAMEWORKS = {"torch", "transformers", "peft", "mlx", "mlx_lm", "accelerate", "trl", "tensorflow", "jax"}
GUESTS = {
    f"verify/trainers/{name}.py"
    for name in (
        "trl_sft",
        "plain_trainer",
        "transformers_side",
        "transformers_settings",
        "mlx_lm_lora",
        "mlx_lm_run",
    )
}
"""Programs that other projects' interpreters run: they have a framework, nothing of ours, and nobody imports them."""
ROOT_ALLOWED = {"cli/app.py"}
"""`ft --version` reads the version; nobody else needs the package root."""
NEIGHBOURS_ALLOWED = {("ports", "records"), ("deployment", "export")}
"""The sockets are written in terms of the values, both foundations of rank 0; what is deployed is exported first."""
_COUNTS = {"max_examples", "stateful_step_count"}
_SILENCER = "suppress_health_check"
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 399, 59, 6


@dataclass(frozen=True)
class SourceFile:
    """One file of the package `finetune`, by its path below the package's folder; it is parsed when it is asked."""

    name: str
    text: str

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return len(self.text.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        """What it says."""
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The folder (or file at the top) that it belongs to; each backend is a room of its own."""
        parts = self.name.removesuffix(".py").split("/")
        return "/".join(parts[:2]) if parts[0] == "backends" and len(parts) > 2 else parts[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and full dotted name of every import, inside functions and TYPE_CHECKING too."""
        package = ["finetune", *self.name.split("/")[:-1]]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def read_tree(root: Path) -> list[SourceFile]:
    """Every Python file below the package's folder."""
    return [
        SourceFile(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    ]


def import_problems(files: list[SourceFile]) -> list[str]:
    """Imports upwards, sideways, of the package root, or of an ML framework outside its room."""
    problems = []
    for file in files:
        if file.room != "__init__":
            problems += [
                f"{file.name}:{line}: {problem}" for line, name in file.imports() if (problem := _wrong(file, name))
            ]
    return problems


def _wrong(file: SourceFile, imported: str) -> str:
    top, _, rest = imported.partition(".")
    if file.name in GUESTS:
        return "imports finetune, which is not where it runs" if top == "finetune" else ""
    if "/".join(rest.split(".")[:3]) + ".py" in GUESTS:
        return "imports a program that another interpreter runs"
    if top in FRAMEWORKS:
        return "" if file.room.startswith("backends/") else f"imports the framework {top}"
    if top != "finetune":
        return ""
    room = rest.split(".")[0]
    if room not in RANKS:
        return "" if file.name in ROOT_ALLOWED and not rest else "imports the package root"
    own = file.room.split("/")[0]
    if room == own:
        inside = "/".join(rest.split(".")[:2])
        sideways = file.room != own and inside != file.room
        return f"imports the neighbour {inside}" if sideways else ""
    if own not in RANKS:
        return f"the room {own} has no rank"
    allowed = RANKS[room] < RANKS[own] or (own, room) in NEIGHBOURS_ALLOWED
    return "" if allowed else f"{own} (rank {RANKS[own]}) imports {room} (rank {RANKS[room]})"


def size_problems(files: list[SourceFile]) -> list[str]:
    """Files, functions and parameter lists that are too long. A typer command's parameters are options: any number."""
    problems = [f"{file.name}: {file.lines} lines" for file in files if file.lines > MOST_LINES]
    for file, node in _functions(files):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MOST_FUNCTION_LINES:
            problems.append(f"{file.name}:{node.lineno}: {node.name} has {length} lines")
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MOST_PARAMETERS and not (file.room == "cli" and node.name == "command"):
            problems.append(f"{file.name}:{node.lineno}: {node.name} has {count} parameters")
    return problems


def docstring_problems(files: list[SourceFile]) -> list[str]:
    """Public modules, classes, functions and methods that say nothing of themselves."""
    problems = [f"{file.name}: the file" for file in files if not ast.get_docstring(file.tree)]
    for file in files:
        for owner in _scopes(file.tree):
            for node in owner.body:
                named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if named and not node.name.startswith("_") and not ast.get_docstring(node):
                    problems.append(f"{file.name}:{node.lineno}: {node.name}")
    return problems


def hypothesis_problems(files: list[SourceFile]) -> list[str]:
    """Laws that state a number of cases of their own, not a share of the profile's, or that silence a health check."""
    suspects = [file for file in files if any(word in file.text for word in (_SILENCER, *_COUNTS))]
    keywords = ((file, node) for file in suspects for node in ast.walk(file.tree) if isinstance(node, ast.keyword))
    return [
        f"{file.name}:{node.value.lineno}: sets {node.arg}"
        for file, node in keywords
        if node.arg == _SILENCER or (node.arg in _COUNTS and isinstance(node.value, ast.Constant))
    ]


def _scopes(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef]:
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))


def _functions(files: list[SourceFile]) -> Iterator[tuple[SourceFile, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return itertools.chain.from_iterable(
        ((file, node) for node in ast.walk(file.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for file in files
    )


def count_functions(files: list[SourceFile]) -> int:
    """How many functions and methods there are."""
    return sum(1 for _ in _functions(files))
