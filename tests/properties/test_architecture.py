"""Laws of the house: who may import whom, how long things may be, and how little an import loads."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import finetune
from finetune.errors import FineTuneError
from finetune_strategies import profiles
from properties.house_rules import (
    GUESTS,
    RANKS,
    SourceFile,
    count_functions,
    docstring_problems,
    hypothesis_problems,
    import_problems,
    read_tree,
    size_problems,
)

SOURCE = Path(finetune.__file__).parent
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "mlx",
    "numpy",
    "matplotlib",
    "tokenizers",
    "jinja2",
    "yaml",
    "huggingface_hub",
)
VERBS = (
    "train",
    "check",
    "estimate",
    "init",
    "schema",
    "evaluate",
    "chat",
    "report",
    "merge",
    "export",
    "compare",
    "deploy",
    "verify",
    "prove",
    "replay",
)


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    """The product's own files."""
    return read_tree(SOURCE)


def test_architecture_sees_the_whole_tree(files: list[SourceFile]) -> None:
    """At least 80 files with 300 functions in all 28 rooms are read, and every room has a rank."""
    assert len(files) >= 80
    assert count_functions(files) >= 300
    assert {file.room.split("/")[0] for file in files} - {"__init__"} == set(RANKS)
    assert len(RANKS) == 36


def test_architecture_imports_go_down_only(files: list[SourceFile]) -> None:
    """A file imports lower ranks and its own room, never sideways, never the root; frameworks only in their room."""
    assert {file.name for file in files} >= GUESTS
    assert sum(1 for file in files for _ in file.imports()) >= 500
    assert import_problems(files) == []


def test_architecture_nothing_is_too_long(files: list[SourceFile]) -> None:
    """Files stay under 400 lines, functions under 60, parameters at 6 or fewer."""
    assert size_problems(files) == []


def test_architecture_whatever_is_public_explains_itself(files: list[SourceFile]) -> None:
    """Every file, public class, function and method has a docstring."""
    assert docstring_problems(files) == []


def test_strategies_know_values_only() -> None:
    """The strategies import the ranks 0 and 1 of the product, and no ML framework."""
    folder = Path(importlib.import_module("finetune_strategies").__file__ or "").parent
    found = read_tree(folder)
    assert len(found) >= 14
    imported = {name for file in found for _, name in file.imports()}
    rooms = {name.split(".")[1] for name in imported if name.startswith("finetune.")}
    assert {room: RANKS[room] for room in rooms if RANKS[room] > 1} == {}
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers", "peft", "mlx"}


def test_laws_leave_their_number_of_cases_to_the_profile() -> None:
    """No law wants a number of cases but as a share of the profile's, and none silences a health check."""
    tests = Path(__file__).parents[1]
    files = [*read_tree(tests), *read_tree(Path(profiles.__file__).parent)]
    assert len(files) >= 45
    assert hypothesis_problems(files) == []


OWN_WAYS = {
    "@settings(max_examples=9)\ndef f(): pass\n": "x.py:1: sets max_examples",
    "FEW = partial(settings,\n  suppress_health_check=list(HealthCheck))\n": "x.py:2: sets suppress_health_check",
    "A.TestCase.settings = settings(max_examples=part, stateful_step_count=5)\n": "x.py:1: sets stateful_step_count",
}


@pytest.mark.parametrize("text", OWN_WAYS, ids=OWN_WAYS.values())
def test_laws_with_a_number_of_their_own_are_found(text: str, tmp_path: Path) -> None:
    """Each of 3 ways around the profile is found in its place; a share of the profile's number is none."""
    assert len(OWN_WAYS) == 3
    _plant(tmp_path, "y.py", "@examples(0.5)\ndef f(): pass\nsettings(max_examples=round(0.5 * more), deadline=None)\n")
    assert hypothesis_problems(read_tree(tmp_path)) == []
    _plant(tmp_path, "x.py", text)
    [problem] = hypothesis_problems(read_tree(tmp_path))
    assert problem.startswith(OWN_WAYS[text])


PLANTED: list[tuple[str, str, Callable[[list[SourceFile]], list[str]], str]] = [
    (
        "tokens/x.py",
        '"""X."""\nfrom finetune.data.read import read_rows\n',
        import_problems,
        "tokens (rank 2) imports data",
    ),
    ("errors.py", '"""X."""\nimport finetune.records\n', import_problems, "errors (rank 0) imports records"),
    ("events.py", '"""X."""\nfrom finetune import pipeline\n', import_problems, "events (rank 1) imports pipeline"),
    ("data/x.py", '"""X."""\nfrom finetune import __version__\n', import_problems, "imports the package root"),
    ("data/x.py", '"""X."""\nimport finetune\n', import_problems, "imports the package root"),
    ("data/x.py", '"""X."""\ndef f():\n    "F."\n    import torch.nn as nn\n', import_problems, "framework torch"),
    ("training/x.py", '"""X."""\nif 0:\n    from peft import LoraConfig\n', import_problems, "framework peft"),
    ("models/x.py", '"""X."""\nfrom ..tokens import batch\n', import_problems, "models (rank 2) imports tokens"),
    ("models/x.py", '"""X."""\nfrom .. import cli\n', import_problems, "models (rank 2) imports cli"),
    ("backends/mlx/x.py", '"""X."""\nfrom finetune.backends.torch import state\n', import_problems, "backends/torch"),
    ("pipeline.py", '"""X."""\nimport finetune.reference_model.recipe\n', import_problems, "imports reference_model"),
    ("attic/x.py", '"""X."""\nfrom finetune.errors import FineTuneError\n', import_problems, "attic has no rank"),
    (
        "data/x.py",
        '"""X."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from finetune.cli import app\n',
        import_problems,
        "data (rank 2) imports cli",
    ),
    ("verify/x.py", '"""X."""\nimport trl\n', import_problems, "imports the framework trl"),
    (
        "verify/x.py",
        '"""X."""\nfrom finetune.verify.trainers.trl_sft import main\n',
        import_problems,
        "imports a program that another interpreter runs",
    ),
    (
        "verify/trainers/mlx_lm_run.py",
        '"""X."""\nfrom finetune.errors import FineTuneError\n',
        import_problems,
        "imports finetune, which is not where it runs",
    ),
    ("data/x.py", '"""X."""\n' + "# more\n" * 399, size_problems, "400 lines"),
    ("data/x.py", '"""X."""\nclass A:\n    def f(self):\n' + "        pass\n" * 59, size_problems, "f has 60 lines"),
    ("data/x.py", '"""X."""\ndef f(a, b, c, /, d, *, e, f, g): pass\n', size_problems, "f has 7 parameters"),
    ("cli/x.py", '"""X."""\ndef other(a, b, c, d, e, f, g): pass\n', size_problems, "other has 7 parameters"),
    ("data/x.py", "x = 1\n", docstring_problems, "data/x.py: the file"),
    ("data/x.py", '"""X."""\nclass A:\n    "A."\n    def f(self): pass\n', docstring_problems, "x.py:4: f"),
    ("data/x.py", '"""X."""\nclass A: pass\n', docstring_problems, "x.py:2: A"),
    ("data/x.py", '"""X."""\nasync def f(): pass\n', docstring_problems, "x.py:2: f"),
]
ALLOWED = {
    "cli/app.py": '"""X."""\ndef f():\n    "F."\n    import finetune\n',
    "cli/train.py": '"""X."""\ndef command(a, *, b, c, d, e, f, g, h): "F."\n',
    "data/x.py": '"""X."""\nfrom finetune.errors import DataError\nfrom finetune.data.read import a\nfrom . import b\n',
    "data/y.py": '"""X."""\ndef _f(): pass\nclass A:\n    "A."\n    def f(self, a, b, c, d, e, f):\n        "F."\n',
    "data/z.py": '"""X."""\n' + "# more\n" * 398,
    "backends/torch/session.py": '"""X."""\nimport torch\nfrom finetune.backends.torch import state\n',
    "verify/trainers/trl_sft.py": '"""X."""\nimport trl\nfrom serving import serve\n',
    "pipeline.py": '"""X."""\nfrom finetune.backends import open_backend\nfrom finetune.training.prepare import a\n',
}


def _plant(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(("name", "text", "rule", "told"), PLANTED, ids=[each[3] for each in PLANTED])
def test_architecture_each_law_bites(
    name: str, text: str, rule: Callable[[list[SourceFile]], list[str]], told: str, tmp_path: Path
) -> None:
    """Each of 24 planted violations is found, by its place, in a tree that is otherwise sound."""
    assert len(PLANTED) == 24
    for allowed, sound in ALLOWED.items():
        _plant(tmp_path, allowed, sound)
    found = read_tree(tmp_path)
    assert len(found) == 8
    assert [problem for law in (import_problems, size_problems, docstring_problems) for problem in law(found)] == []
    _plant(tmp_path, name, text)
    [problem] = rule(read_tree(tmp_path))
    assert told in problem
    assert problem.startswith(name)


def test_package_all_is_exactly_what_can_be_imported() -> None:
    """Each of 6 public names can be imported, is documented, and no other public name can."""
    assert len(finetune.__all__) == len(set(finetune.__all__)) == 6
    for name in finetune.__all__:
        value = getattr(finetune, name)
        assert isinstance(value, str) or value.__doc__
    assert issubclass(finetune.FineTuneError, FineTuneError)
    for name in ("fine_tun", "TorchBackend", "train", "_hidden"):
        with pytest.raises(AttributeError, match=name):
            getattr(finetune, name)
        with pytest.raises(ImportError):
            exec(f"from finetune import {name}", {})


STATEMENTS = (
    "import finetune",
    "import finetune.cli.app",
    "from finetune import load_config, TrainingConfig, TrainingSuccessValidator",
    "from finetune import fine_tune",
)
"""Each loads more than those before it, so that one fresh interpreter can say what each of them loads."""


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, set[str]]:
    """The top-level modules that a fresh interpreter has loaded after each statement."""
    tell = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{statement}\n{tell}" for statement in STATEMENTS)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {statement: set(line.split()) for statement, line in zip(STATEMENTS, done.stdout.splitlines(), strict=True)}


def test_import_of_the_package_loads_nothing_else(loaded_by: dict[str, set[str]]) -> None:
    """`import finetune` loads none of the libraries it can use, pydantic, typer and rich included."""
    loaded = loaded_by["import finetune"]
    assert "finetune" in loaded
    assert loaded & {*HEAVY, "pydantic", "typer", "rich", "psutil", "safetensors"} == set()


def test_import_of_the_command_line_loads_no_library_of_the_verbs(loaded_by: dict[str, set[str]]) -> None:
    """The `ft` command line loads typer, and the verbs' libraries only when a verb runs."""
    loaded = loaded_by["import finetune.cli.app"]
    assert loaded & {*HEAVY, "pydantic", "psutil", "safetensors"} == set()
    assert {"typer", "finetune"} <= loaded


def test_import_of_the_configuration_loads_no_framework(loaded_by: dict[str, set[str]]) -> None:
    """Reading a configuration takes pydantic and YAML, and nothing that computes."""
    loaded = loaded_by["from finetune import load_config, TrainingConfig, TrainingSuccessValidator"]
    assert loaded & (set(HEAVY) - {"yaml"}) == set()
    assert {"pydantic", "yaml"} <= loaded


def test_import_of_the_pipeline_loads_no_framework(loaded_by: dict[str, set[str]]) -> None:
    """The pipeline itself knows no framework: that is the backend's, and loaded when it is opened."""
    assert loaded_by["from finetune import fine_tune"] & {"torch", "transformers", "peft", "mlx"} == set()


def test_command_ft_is_installed_and_names_every_verb() -> None:
    """The entry point `ft` exists, and its help names every verb, on standard output, with exit code 0."""
    [entry] = entry_points(group="console_scripts", name="ft")
    assert entry.value == "finetune.cli:main"
    program = shutil.which("ft", path=Path(sys.executable).parent) or shutil.which("ft")
    assert program is not None
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [verb for verb in VERBS if f"\n  {verb} " not in done.stdout] == []
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, env=environment)
    assert told.stdout == f"finetune-suite {finetune.__version__}\n"
