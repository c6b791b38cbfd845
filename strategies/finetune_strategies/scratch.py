"""Empty folders for cases that write files: one is emptied and used again, for a new one takes longer than a case."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SPARE: list[Path] = []


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder with nothing in it, for this context alone."""
    folder = _SPARE.pop() if _SPARE else _new_folder()
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        _SPARE.append(folder)


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="finetune-scratch-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
