"""The examples of the documentation, run one after another by a reader in an empty folder."""

from pathlib import Path

import pytest

from repo.page_examples import ROOT, Example, agrees, examples, play

DOCS = ROOT / "docs"
PROGRAMS_RUN = {
    "ci.md": 1,
    "notebook.md": 1,
    "pre-commit.md": 1,
    "python.md": 3,
    "tutorial.md": 14,
    "your-trainer.md": 4,
}
"""How many programs each page runs; every page that runs one is listed."""
NEEDED = {"tutorial.md": "xllamacpp"}
"""What a page tells its reader to install besides the package and the `verify` extra."""


@pytest.mark.parametrize("name", PROGRAMS_RUN)
def test_docs_examples_do_what_is_shown(name: str, reader: Path, tmp_path: Path) -> None:
    """With the built wheel every command of a page works as it stands, in its order, and says what the page shows."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
    assert play(DOCS / name, tmp_path, reader) == PROGRAMS_RUN[name]


def test_docs_examples_are_all_run() -> None:
    """No page has an example that the law above does not run."""
    found = {page.name: sum(isinstance(one, Example) for one in examples(page)) for page in sorted(DOCS.glob("*.md"))}
    assert len(found) >= 12
    assert {name: count for name, count in found.items() if count} == PROGRAMS_RUN


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("a\nb\n", "a  \nb\n", True),
        ("a\n...\nc\n", "a\nb\nb\nc\n", True),
        ("a\n...\nc\n", "a\nc\n", True),
        ("step ... of 9\n", "step 3 of 9\n", True),
        ("...\n", "", True),
        ("", "", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\nc\n", "a\nc\nd\n", False),
        ("step ... of 9\n", "step 3\nof 9\n", False),
        ("a.c\n", "abc\n", False),
        ("", "a\n", False),
    ],
)
def test_docs_examples_agree_only_with_what_is_shown(shown: str, said: str, *, same: bool) -> None:
    """Dots stand for what is left out, of a line or of lines; everything else must be there, and nothing more."""
    assert agrees(shown, said) is same
