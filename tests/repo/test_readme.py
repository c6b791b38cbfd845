"""The commands of the README and of the page on serving, run one after another by a new user in an empty folder."""

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from repo.page_examples import ROOT, blocks, user

SHORT = {"FT_TRAINING__MAX_STEPS": "2", "FT_JUDGE__MEMORY": "never", "FT_JUDGE__CONTROL": "never"}
"""Everything is done as written, but two steps of training are enough here."""


def shown() -> list[str]:
    """The lines of both pages' shell blocks that call `ft`, without what they say of themselves."""
    pages = (ROOT / "README.md", ROOT / "docs" / "serving.md")
    told = [block.text for page in pages for block in blocks(page) if block.language == "bash"]
    lines = [line.split(" #")[0].strip() for text in told for line in text.splitlines()]
    return [line for line in lines if line.startswith("ft ")]


def run(words: list[str], reader: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `ft` as the README has it, in a user's environment with the built wheel."""
    command, environment = [str(reader.with_name("ft")), *words], user(reader, **SHORT)
    says = "What is 2 plus 1?\n\n"
    return subprocess.run(command, cwd=folder, input=says, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.tier2
def test_readme_commands_of_ft_do_what_they_say(reader: Path, tmp_path: Path) -> None:
    """Each `ft` line works as it stands, in its order, on a user's own rows; training ends with its verdicts.

    Lines that judge other trainers in their own environments have laws of their own.
    """
    lines = shown()
    assert [line.split()[1] for line in lines] == [
        *("check", "train", "chat", "export", "verify", "prove"),
        *("chat", "merge", "export", "deploy", "deploy", "compare", "push"),
    ]
    rows = [{"prompt": f"What is {number} plus 1?", "completion": str(number + 1)} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line in lines:
        words = line.split()[1:]
        # Until Ctrl-C is too long to wait.
        words += ["--check-only"] if "llama.cpp" in words else []
        # Nothing is sent, and two steps fail the verdict.
        words += ["--check-only", "--force"] if words[0] == "push" else []
        done = run(words, reader, tmp_path)
        # Two steps teach nothing, and a run that says so ends with 1 or 4.
        allowed = (0, 1, 4) if words[0] in ("train", "evaluate", "report") else (0,)
        if done.returncode == 3 and "ollama" in words:
            assert "no Ollama answers" in done.stderr
            continue
        assert done.returncode in allowed, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        assert done.stdout.strip(), line
    assert (tmp_path / "runs" / "first" / "run.json").exists()
