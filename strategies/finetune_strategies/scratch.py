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
    folder = _SPARE.pop() if _SPARE else lasting_folder("scratch")
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        _SPARE.append(folder)


def lasting_folder(what: str) -> Path:
    """A new folder, named after what it is for, that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix=f"finetune-{what}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
