"""Laws of symbolic links in managed folders: nothing outside a folder is ever written, removed or taken for its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import OutputError
from finetune.files import describe_files, remove_torn, write_bytes
from finetune.run.folder import RunFolder

PLACES = ("lock.json", "events.jsonl", "plan.yaml", "checkpoints", "checkpoints/step-00000002", "adapter", ".a.1.part")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Somebody's folder, which is afterwards as it was."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    yield folder
    assert [file["path"] for file in describe_files(folder)] == ["mine"]
    assert (folder / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("place", PLACES)
def test_run_folder_with_a_link_is_not_taken_up(place: str, kind: str, outside: Path, tmp_path: Path) -> None:
    """A link anywhere in a run, whatever it leads to, is refused by its name before a byte is written."""
    run = RunFolder(tmp_path / "run")
    (run.path / place).parent.mkdir(parents=True)
    (run.path / place).symlink_to({"file": outside / "mine", "folder": outside, "nothing": outside / "new"}[kind])
    with pytest.raises(OutputError, match="holds symbolic links: ") as caught:
        run.claim()
    assert caught.value.message.endswith(f": {place}")
    assert caught.value.hint
    assert [path.name for path in run.path.rglob("*") if not path.is_symlink()] == list(Path(place).parts[:-1])


def test_temporary_name_that_is_a_link_is_replaced(outside: Path, tmp_path: Path) -> None:
    """A link in the place of the temporary file is not written through, and remove_torn removes links themselves."""
    path = tmp_path / "a"
    temporary = tmp_path / f".a.{os.getpid()}.part"
    temporary.symlink_to(outside / "mine")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert not temporary.is_symlink()
    temporary.symlink_to(outside)
    remove_torn(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "outside"]
