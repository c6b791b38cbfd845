"""Laws of the house: who may import whom, how long things may be, and how little an import loads."""

import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import get_args

import pytest

import finetune
from finetune.abilities import ABILITIES
from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.config import TrainingConfig
from finetune.errors import FineTuneError
from finetune.models.quantize import SCHEMES

pytest.importorskip("importlinter", reason="needs import-linter: pip install 'finetune-suite[dev]'")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "finetune"
STRATEGIES = ROOT / "strategies" / "finetune_strategies"
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 399, 59, 6
KINDS = list(ADAPTER_KINDS)
NO_KINDS = {
    *("records.py", "export/blueprint.py", "report/build.py", "report/charts.py", "report/wording.py"),
    *("criteria/evidence.py", "evidence/extra_runs.py", "evidence/memory.py", "memory/outlook.py"),
}
"""Here "lora" is a default, a word of GGUF's, or one of two measures of memory, and is compared with nothing."""
GUESTS = SOURCE / "verify" / "trainers"
"""Among these are programs that a peer's interpreter runs: they import nothing of ours."""
HEAVY = {
    *("torch", "transformers", "peft", "mlx", "numpy", "matplotlib", "tokenizers", "jinja2", "yaml"),
    *("huggingface_hub", "datasets", "pandas", "pyarrow"),
}
VERBS = (
    *("train", "check", "estimate", "init", "schema", "evaluate", "chat", "report", "merge", "export", "compare"),
    *("deploy", "import", "verify", "prove", "replay", "runs", "push"),
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees(root: Path) -> Iterator[tuple[str, ast.Module, str]]:
    """Name, syntax tree and text of each Python file below a folder."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(root).as_posix(), ast.parse(text), text


def size_problems(root: Path) -> list[str]:
    """Files, functions and parameter lists that are too long; a command's parameters are options, any number."""
    problems = []
    for name, tree, text in trees(root):
        if len(text.splitlines()) > MOST_LINES:
            problems.append(f"{name}: {len(text.splitlines())} lines, at most {MOST_LINES}")
        for node in ast.walk(tree):
            if not isinstance(node, Function):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                problems.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MOST_FUNCTION_LINES}")
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MOST_PARAMETERS and not (name.startswith("cli/") and node.name == "command"):
                problems.append(f"{name}:{node.lineno}: {node.name} has {count} parameters, at most {MOST_PARAMETERS}")
    return problems


def class_problems(root: Path) -> list[str]:
    """Class names that are defined more than once."""
    places: dict[str, list[str]] = {}
    for name, tree, _ in trees(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    return [f"class {name} is defined in {', '.join(where)}" for name, where in sorted(places.items()) if where[1:]]


def late_problems(root: Path) -> list[str]:
    """Imports of our own modules inside functions: outside `cli/` a late import is for a heavy library."""
    problems = []
    for name, tree, _ in trees(root):
        for function in ast.walk(tree):
            if not isinstance(function, Function) or name.startswith("cli/"):
                continue
            for node in ast.walk(function):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                if module.partition(".")[0] == "finetune":
                    problems.append(f"{name}:{node.lineno}: {function.name} imports {module} when it is called")
    return problems


def child_problems(root: Path) -> list[str]:
    """Modules that a file starts by their names, as child processes, from a layer below theirs."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    rank = {room.strip(): -number for number, layer in enumerate(layers) for room in re.split(r"[|:]", layer)}
    problems = []
    for name, tree, _ in trees(root):
        own = name.removesuffix(".py").split("/")[0]
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            found = re.fullmatch(r"finetune\.([a-z_]+)(\.[a-z_]+)*", text)
            if found and own in rank and rank.get(found[1], -99) > rank[own]:
                problems.append(f"{name}:{node.lineno}: {own} starts {text}, which lies above it")
    return problems


def kind_problems(root: Path) -> list[str]:
    """Kinds of adapters that a file calls by their names: only `adapters/` knows them, all else asks its registry."""
    problems = []
    for name, tree, _ in trees(root):
        if name.startswith(("adapters/", "verify/trainers/")):
            continue
        nodes = ast.walk(tree)
        if name in NO_KINDS:
            nodes = (each for node in nodes if isinstance(node, ast.Compare) for each in ast.walk(node))
        lines = {node.lineno: node.value for node in nodes if isinstance(node, ast.Constant) and node.value in KINDS}
        problems += [f"{name}:{line}: the adapter kind {kind!r} is named" for line, kind in sorted(lines.items())]
    return problems


def import_problems(folder: Path) -> list[str]:
    """What import-linter says of the package below a folder, by the contracts in pyproject.toml."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{STRATEGIES.parent}"}
    command = ["from importlinter.cli import lint_imports_command as run; run()", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-c", *command, "--no-cache"], capture_output=True, text=True, env=environment, cwd=folder
    )
    if done.returncode == 0:
        return []
    told = done.stdout.partition("Broken contracts")[2] or done.stdout + done.stderr
    return [line for line in told.splitlines() if line.strip().startswith(("- ", "No cycles", "finetune"))] or [told]


def test_house_holds_its_rules() -> None:
    """No import goes up or round, nothing is too long, no class name stands twice, and no import of ours is late."""
    assert sum(1 for _ in trees(SOURCE)) >= 200
    assert import_problems(SOURCE.parent) == []
    assert [problem for root in (SOURCE, STRATEGIES) for problem in size_problems(root)] == []
    assert class_problems(SOURCE) == []
    assert late_problems(SOURCE) == []
    assert child_problems(SOURCE) == []
    assert kind_problems(SOURCE) == []


def test_house_formatter_is_not_fought() -> None:
    """Fewer than 10 lines of the whole repository are kept from the formatter."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in names] or sorted(ROOT.glob("[!.]*/**/*.py"))
    assert len(files) >= 200
    assert sum(path.read_text(encoding="utf-8").count("# fmt: " + "skip") for path in files if path.exists()) < 10


PLANTED = [
    (
        "data/x.py",
        "from finetune.chat import render\nfrom finetune.cli import app\n",
        "finetune.data.x -> finetune.cli.app",
    ),
    ("errors.py", "import finetune.train\n", "finetune.errors -> finetune.train"),
    (
        "report/x.py",
        "def f():\n    from finetune.criteria import judge\n",
        "finetune.report.x -> finetune.criteria.judge",
    ),
    ("training/x.py", "def f():\n    import torch.nn as nn\n", "finetune.training.x -> torch"),
    ("chat/render.py", "from finetune.chat import encoder\n", "No cycles are allowed in finetune.chat"),
    ("attic/__init__.py", "from finetune.errors import FineTuneError\n", "finetune.attic"),
]


@pytest.mark.parametrize(("name", "text", "told"), PLANTED, ids=[each[0] for each in PLANTED])
def test_house_refuses_a_planted_import(name: str, text: str, told: str, tmp_path: Path) -> None:
    """An import upwards, sideways, round, late or of a framework is named, and so is a room without a layer."""
    shutil.copytree(SOURCE, tmp_path / "finetune", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    path = tmp_path / "finetune" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + (path.read_text(encoding="utf-8") if path.exists() else ""), encoding="utf-8")
    problems = import_problems(tmp_path)
    assert any(told in problem for problem in problems), problems


LOCAL = [
    ("data/x.py", "# more\n" * 400, size_problems, "data/x.py: 400 lines"),
    ("data/x.py", "class A:\n    def f(self):\n" + "        pass\n" * 59, size_problems, "data/x.py:2: f has 60 lines"),
    ("data/x.py", "def f(a, b, c, /, d, *, e, f, g): pass\n", size_problems, "data/x.py:1: f has 7 parameters"),
    ("data/x.py", "class Known: pass\n", class_problems, "class Known is defined in data/x.py, data/y.py"),
    (
        "data/x.py",
        "def f():\n    from finetune.errors import A\n",
        late_problems,
        "data/x.py:2: f imports finetune.errors",
    ),
    ("data/x.py", "if kind == 'dora': pass\n", kind_problems, "data/x.py:1: the adapter kind 'dora' is named"),
    ("records.py", "a = 'lora' in kinds\n", kind_problems, "records.py:1: the adapter kind 'lora' is named"),
    ("data/x.py", "run('finetune.cli.worker')\n", child_problems, "data/x.py:1: data starts finetune.cli.worker"),
]


@pytest.mark.parametrize(("name", "text", "rule", "told"), LOCAL, ids=[each[3] for each in LOCAL])
def test_house_refuses_what_is_planted(name: str, text: str, rule, told: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A file, function or parameter list too long, a class name twice, a late import and a child above are named."""
    for sound, words in (
        ("data/y.py", "class Known: pass\n"),
        ("cli/train.py", "def command(a, b, c, d, e, f, g): 0\n"),
    ):
        (tmp_path / sound).parent.mkdir()
        (tmp_path / sound).write_text(words)
    assert rule(tmp_path) == []
    (tmp_path / name).write_text(text)
    [problem] = rule(tmp_path)
    assert problem.startswith(told)


def test_guests_import_nothing_of_ours() -> None:
    """What a peer's interpreter runs imports nothing of ours, and nothing of ours imports it."""
    names = {"trl_sft", "plain_trainer", "transformers_side", "transformers_settings", "mlx_lm_lora", "mlx_lm_run"}
    names.add("peer")
    for name in names:
        tree = ast.parse((GUESTS / f"{name}.py").read_text(encoding="utf-8"))
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
        assert [module for module in imported if module.split(".")[0] == "finetune"] == []
    ours = itertools.chain.from_iterable(
        (node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        for name, tree, _ in trees(SOURCE)
    )
    assert [module for module in ours if module.startswith("finetune.verify") and module.split(".")[-1] in names] == []


def test_abilities_are_those_of_the_backends() -> None:
    """Each of 3 backends says of itself what `abilities` says of it, and what that names is known."""
    assert set(ABILITIES) == set(get_args(TrainingConfig.model_fields["backend"].annotation))
    assert {scheme for able in ABILITIES.values() for scheme in able.schemes.values()} == set(SCHEMES)
    for name, able in ABILITIES.items():
        # Read, not imported: a backend's file loads its framework.
        assert f'    abilities = ABILITIES["{name}"]\n' in (SOURCE / "backends" / name / "backend.py").read_text(
            "utf-8"
        )
        assert (SOURCE / "backends" / name / "probe.py").exists() == able.memory


MEASURED = ("memory/forecast.py", "memory/outlook.py")
"""What a backend takes in memory was measured, or counted by hand, for each by its name."""


def names_asked_for(root: Path) -> list[str]:
    """Where a backend is compared with a name, instead of asked what it can."""
    return [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree, _ in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "backend" in ast.unparse(node.left)
        if any(isinstance(each, ast.Constant) and each.value in ABILITIES for each in node.comparators)
        if not name.startswith("verify/") and name not in MEASURED
    ]


def test_no_backend_is_asked_for_by_its_name(tmp_path: Path) -> None:
    """What only some backends can is asked of `abilities`; a test by name is found."""
    assert names_asked_for(SOURCE) == []
    (tmp_path / "room.py").write_text('if config.backend != "mlx":\n    raise ValueError\n')
    assert names_asked_for(tmp_path) == ["room.py:1: config.backend != 'mlx'"]


def test_package_all_is_exactly_what_can_be_imported() -> None:
    """Each of 10 public names can be imported, is documented, and no other name is given."""
    assert len(finetune.__all__) == len(set(finetune.__all__)) == 10
    for name in finetune.__all__:
        value = getattr(finetune, name)
        assert isinstance(value, str) or value.__doc__
    assert issubclass(finetune.FineTuneError, FineTuneError)
    for name in ("fine_tun", "TorchBackend", "_hidden"):
        with pytest.raises(AttributeError, match=name):
            getattr(finetune, name)


STATEMENTS = {
    "import finetune": HEAVY | {"pydantic", "typer", "rich", "psutil", "safetensors"},
    "import finetune.cli.app": HEAVY | {"pydantic", "psutil", "safetensors"},
    "from finetune import load_config, TrainingConfig, TrainingSuccessValidator": HEAVY - {"yaml"},
    "from finetune import fine_tune": {"torch", "transformers", "peft", "mlx"},
    "import finetune.backends.reference.reload": {"torch", "transformers", "peft", "mlx", "ml_dtypes", "jax"},
}
"""Each loads more than those before it, and none of what stands beside it."""


def test_imports_load_as_little_as_they_can() -> None:
    """`import finetune` loads no library, the command line only typer, and nothing loads a framework."""
    tell = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{statement}\n{tell}" for statement in STATEMENTS)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for (statement, forbidden), line in zip(STATEMENTS.items(), done.stdout.splitlines(), strict=True):
        assert set(line.split()) & forbidden == set(), statement
    assert {"typer", "pydantic", "yaml"} <= set(done.stdout.splitlines()[2].split())


def test_command_ft_is_installed_and_names_every_verb() -> None:
    """The entry point `ft` exists, and its help names every verb, on standard output, with exit code 0."""
    [entry] = entry_points(group="console_scripts", name="ft")
    assert entry.value == "finetune.cli:main"
    assert importlib.import_module("finetune.cli").main
    program = shutil.which("ft", path=Path(sys.executable).parent) or shutil.which("ft")
    assert program is not None
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [verb for verb in VERBS if f"\n  {verb} " not in done.stdout] == []
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, env=environment)
    assert told.stdout == f"finetune-suite {finetune.__version__}\n"
