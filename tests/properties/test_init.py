"""The files that `ft init` writes: short ones, and recipes for models by family and size."""

from pathlib import Path

import pytest
import yaml

from finetune.cli.app import run
from finetune.config import PROFILES, load_config
from finetune.config.recipes import RECIPES, minimal_config

MOST_LINES = 20


@pytest.mark.parametrize("profile", [None, *PROFILES])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_minimal_file_sets_what_it_says_and_no_more(recipe: str | None, profile: str | None, tmp_path: Path) -> None:
    """It is short, loads without a problem, names its model, and leaves rate and epochs to be derived."""
    text = minimal_config(recipe, profile=profile)
    assert len(text.splitlines()) <= MOST_LINES
    path = tmp_path / "finetune.yaml"
    path.write_text(text)
    loaded = load_config(path, environ={})
    written = {key for key, origin in loaded.origins.items() if origin == "file"}
    assert {"model.path", "data.train"} <= written
    assert not written & {"training.epochs", "training.learning_rate"}
    assert loaded.config.model.path == (RECIPES[recipe].model if recipe else "reference-llama")
    for key, value in (RECIPES[recipe].values if recipe else {}).items():
        section, _, name = key.partition(".")
        assert getattr(getattr(loaded.config, section), name) == value
    assert ("hf auth login" in text) == bool(recipe and RECIPES[recipe].gated)
    # What is written as a comment is right where it stands, too.
    shown = text.replace("  # epochs", "  epochs").replace("  # learning", "  learning")
    shown = shown.replace("# training:", "training:").replace("#   ", "  ")
    path.write_text(shown)
    training = load_config(path, environ={}).config.training
    assert (training.epochs, training.learning_rate) == (3, 2e-4)


def test_init_writes_minimal_files_and_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--minimal`, `--recipe` and `--profile` write short files; a name that is not there is told with the nearest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FT_BACKEND", "reference")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say one", "completion": "one"}\n' * 3)
    assert run(["init", "--minimal"]) == 0
    assert run(["check", "finetune.yaml"]) == 0
    assert run(["init", "qwen.yaml", "--recipe", "qwen3-4b", "--profile", "chat"]) == 0
    assert yaml.safe_load(Path("qwen.yaml").read_text())["profile"] == "chat"
    capsys.readouterr()
    for words, told in (
        (["--recipe", "qwen3-4"], "did you mean qwen3-4b?"),
        (["--recipe", "zzz"], "there are: smollm2-135m"),
        (["--profile", "chatt"], "did you mean chat?"),
    ):
        assert run(["init", "other.yaml", *words]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert len(said.splitlines()) <= 3
    assert not Path("other.yaml").exists()
