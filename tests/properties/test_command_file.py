"""Laws of a subject's TOML file: what is wrong in it is told at once, each with its place and a way to mend it."""

from pathlib import Path

import pytest

from finetune.errors import ConfigError, UsageError
from finetune.verify.subjects.command_file import load_command

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "subjects").glob("*.toml"))
WRONG = """
name = "it"
formt = "peft"
checkpoints = 'checkpoint-([0-9]+)'
told = { line = '(?P<lost>[0-9]' }
[settings]
"training.learnin_rate" = 0.1
[train]
argv = ["it", "{modl}", "{settings.training.seeds}", "{ brace }", "{files.a}"]
seconds = 0
[evaluate]
argv = []
answer = 'loss'
"""
EXPECTED = {
    "formt": "did you mean format?",
    "checkpoints": "(?P<step>...)",
    "told.line": "regular expression",
    "settings.training.learnin_rate": "did you mean training.learning_rate?",
    "train.argv": "{model}",
    "train.seconds": "greater than 0",
    "evaluate.argv": "at least 1",
    "evaluate.answer": "(...)",
}


def test_command_file_tells_every_problem_at_once(tmp_path: Path) -> None:
    """Each place with something wrong is named, with what mends it; braces that name nothing are no problem."""
    path = tmp_path / "it.toml"
    path.write_text(WRONG, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_command(path)
    told = [
        (problem.where.removeprefix(f"{path}: "), f"{problem.what} {problem.hint}") for problem in caught.value.problems
    ]
    for place, words in EXPECTED.items():
        assert any(where == place and words in what for where, what in told), (place, told)
    assert {where for where, _ in told} == set(EXPECTED)
    assert sum(where == "train.argv" for where, _ in told) == 3
    assert "brace" not in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("name = ", "is no TOML")])
def test_command_file_that_is_none_is_a_usage_error(text: str | None, words: str, tmp_path: Path) -> None:
    """A file that is not there, or is no TOML, is refused by its path."""
    path = tmp_path / "it.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=words) as caught:
        load_command(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_command_file_examples_are_right(path: Path) -> None:
    """Each of these files that are shown can be read, and says how a run goes on."""
    assert load_command(path).commands["resume"].argv
