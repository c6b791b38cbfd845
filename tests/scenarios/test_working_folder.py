"""Laws of the working folder: no Python file in it is ever executed, and a run does not depend on which it is."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import finetune
from finetune.evidence.saved import prepare_again
from finetune.run.folder import RunFolder
from finetune.train import fine_tune
from finetune.training.prepare import prepare
from support.workplace import OWN_TEMPLATE, make_data, make_model, settings, without_reload_check

SOURCE = Path(finetune.__file__).parent
NAMES = "finetune json numpy torch safetensors conftest sitecustomize types contextlib warnings"
NAMES += " mlx accelerate transformers subprocess tokenizers trl peft importlib"
"""Names that a user's own file may have, and that the programs `ft` starts would import."""
SHORT = "--set training.max_steps=2 --set judge.control=never --set evaluation.questions=2"
SHORT += " --set evaluation.retention_questions=2"
TRAIN = f"train --data rows.jsonl --output run {SHORT}"
FINDING = {
    "format": "finetune finding",
    "version": 2,
    "law": "mask.answers",
    "statement": "",
    "subject": "reference",
    "case": {
        "conversations": [{"system": None, "turns": [{"prompt": "ab", "completion": "cde"}], "template": "chatml"}]
    },
    "expected": "",
    "got": "",
}
STORY = {
    **FINDING,
    "law": "store.answers",
    "case": {
        "scene": "checkpoints",
        "keep": 1,
        "stages": [{"do": "work", "orders": [{"do": "save", "step": 1, "content": "x"}]}],
    },
}
COMMAND = """
name = "python's own"
version = ["{python}", "-c", "import json, warnings; print(1)"]
[train]
argv = ["{python}", "-c", "import json"]
"""
VERBS = {
    "train": f"{TRAIN} --backend reference",
    "check": "check --data rows.jsonl",
    "estimate": "estimate --data rows.jsonl --backend reference --set training.max_steps=2",
    "verify": "verify --subject reference --law mask.answers",
    "verify a command": "verify --subject command.toml --law files.whole",
    "verify a peer": "verify --subject trainer --law template.ends",
    "prove": "prove --fault A002 --seeds 1 --output proof",
    "replay a finding": "replay finding.json",
    "replay a story": "replay story.json",
    **{
        name: f"{TRAIN} --launch {name} --processes 2 --set judge.memory=never"
        for name in ("torchrun", "accelerate", "mlx.launch")
    },
}
VERBS["mlx.launch"] += " --backend mlx"
"""Each verb that starts a process."""
NEEDS = {"torchrun": "torch", "accelerate": "accelerate", "mlx.launch": "mlx", "verify a peer": "peft"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data, in which files of such names lie that say when they are executed."""
    text = 'import os\nwith open({!r}, "a") as ran:\n    print({!r}, file=ran)\n'
    for name in NAMES.split():
        (tmp_path / f"{name}.py").write_text(text.format(str(tmp_path / "RAN"), name))
    rows = [{"instruction": f"What is {number} plus 1?", "output": str(number + 1)} for number in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "finding.json").write_text(json.dumps(FINDING))
    (tmp_path / "story.json").write_text(json.dumps(STORY))
    (tmp_path / "command.toml").write_text(COMMAND)
    return tmp_path


def ft(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run `ft` as its installed program does, which has no working folder among what it imports from."""
    command = [sys.executable, "-P", "-c", "from finetune.cli import main; main()", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("verb", VERBS)
def test_files_of_the_working_folder_are_not_executed(verb: str, folder: Path) -> None:
    """A user's own finetune.py or json.py beside the data is left alone, and the verb does its work."""
    if (needed := NEEDS.get(verb)) and find_spec(needed) is None:
        pytest.skip(f"needs {needed}: pip install 'finetune-suite[{'mlx' if needed == 'mlx' else 'torch'}]'")
    done = ft(*VERBS[verb].split(), cwd=folder)
    ran = folder / "RAN"
    assert not ran.exists(), (ran.read_text(), done.stderr[-600:])
    if verb != "verify a command":
        assert done.returncode in (0, 1, 4), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]


def lists(tree: ast.AST) -> Iterator[tuple[int, list[ast.expr]]]:
    """Every list and tuple that is written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            yield node.lineno, node.elts


def unsafe(name: str, text: str) -> list[str]:
    """Where a file starts Python by itself instead of through `processes.python_command`."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "executable" and ast.unparse(node) == "sys.executable":
            found.append(f"{name}:{node.lineno}: sys.executable")
    for line, parts in lists(tree):
        words = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        if words & {"-m", "-c"} and not words & {"-P", "-I"}:
            found.append(f"{name}:{line}: a command with {' and '.join(sorted(words & {'-m', '-c'}))}")
    return found


OTHERS = {"processes.py": 1, "verify/subjects/command.py": 1, "verify/subjects/choose.py": 1, "errors.py": 2}
"""How often a file may name this interpreter: the one helper, where a user may name another one, and a line to type."""


def test_every_python_is_started_through_one_helper() -> None:
    """A new place that starts Python by itself is told by its file and line."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        found = unsafe(name, path.read_text(encoding="utf-8"))
        assert len(found) == OTHERS.get(name, 0), f"{found}: start Python through finetune.processes.python_command"


def test_a_planted_start_is_seen() -> None:
    """The rule sees both ways to write it."""
    assert len(unsafe("x.py", "import sys\nrun([sys.executable, '-m', 'finetune.x'])")) == 2
    assert len(unsafe("x.py", "run((python, '-c', 'pass'))")) == 1
    assert not unsafe("x.py", "run(python_command('-m', 'finetune.x'))")


def test_run_is_evaluated_with_its_own_template_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that was named from one folder is the run's in every other: that of the same name there is not it."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        template = OWN_TEMPLATE.replace("m.role", f"'{name} ' + m.role").replace("assistant: ", f"{name} assistant: ")
        (tmp_path / name / "my.jinja").write_text(template)
    monkeypatch.chdir(tmp_path / "first")
    chosen = settings(make_model(tmp_path / "model"), make_data(tmp_path / "rows.jsonl", 6), template__name="my.jinja")
    with without_reload_check():
        fine_tune(chosen, output=tmp_path / "run")
    prompts = [question.ids for question in prepare(chosen).questions]
    for folder in (tmp_path / "second", tmp_path):
        monkeypatch.chdir(folder)
        again = prepare_again(RunFolder(tmp_path / "run"))
        assert [question.ids for question in again.questions] == prompts != []
