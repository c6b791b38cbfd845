"""Writes files so that they are whole or not there: temporary file, flush to disk, rename."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import OutputError, StorageError
from finetune.reading import check_regular, open_regular


def meant_file(path: Path, hint: str) -> str:
    """A hint about a file that cannot be read; where it is not there, the nearest beside it comes first."""
    near = None if path.exists() else nearest_file(path)
    return f"did you mean {near}? {hint}" if near else hint


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    return any((path / mark).is_file() for mark in ("plan.yaml", "run.json"))


def run_around(path: Path) -> Path | None:
    """The run that a folder is, lies in, or holds; of several that it holds, one."""
    try:
        inside = [place for place in islice(path.iterdir(), 10_000) if is_run(place)]
    except OSError:
        return None
    return next((place for place in (path, *path.parents, *sorted(inside)) if is_run(place)), None)


def nearest_file(path: Path) -> Path | None:
    """The file or folder beside one that is not there whose name is nearest to its own."""
    try:
        names = [place.name for place in islice(path.parent.iterdir(), 10_000)]
    except (OSError, ValueError):
        return None
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return path.with_name(near[0]) if near else None


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` atomically: a reader sees the old file or the new one, never half of it.

    Raises:
        StorageError: no space left, read-only, ...; what was at `path` before is intact. So it is with every
            function here that writes.
    """
    write_bytes(path, text.encode("utf-8"))


def write_output(path: Path, text: str) -> None:
    """Put `text` where somebody named: through a link into what it leads to, into a device or a pipe as it is.

    Raises:
        StorageError: as `write_text`; or it is a pipe that nobody reads, or a socket.
    """
    with storage_errors(path):
        found = path.stat() if path.exists() else None
        if found is None or stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and not _is_open(found)):
            # Of a link only what it leads to is replaced.
            write_text(Path(os.path.realpath(path)), text)
            return
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            if _is_open(found, number):
                # Opened anew, it would be cut off, or could not be opened at all.
                stream.flush()
                handle = os.dup(number)
                break
        else:
            # Without this a pipe that nobody reads is waited for without end.
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            os.set_blocking(handle, True)
        with open(handle, "wb") as file:
            file.write(text.encode("utf-8"))


def _is_open(found: os.stat_result, *numbers: int) -> bool:
    """Whether it is what this process writes its output to."""
    for number in numbers or (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(number)):
                return True
    return False


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` atomically."""

    def fill(temporary: Path) -> None:
        with temporary.open("xb") as file:  # never through a link that somebody put there
            file.write(content)

    write_file(path, fill)


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file, then put it at `path` in one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        # Only ever a new file: what bears the name already may be a link to somewhere else.
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            check_regular(path)  # what is no file would be gone for whoever uses it
        try:
            fill(temporary)
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Put `value` at `path` as JSON, atomically; NaN and infinity are refused, they are not JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A path that is no UTF-8 has halves of letters, which JSON can spell.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_space(path: Path, wanted: int, *, smaller: str) -> None:
    """Raise OutputError where the disk has no room for `wanted` bytes; `smaller` says how to write less."""
    free = shutil.disk_usage(path.parent).free
    if wanted > free:
        raise OutputError(
            f"{path} takes about {wanted / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free",
            hint=f"free some space, choose another --output, or {smaller}",
        )


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then put it at `path` in one rename.

    Raises:
        StorageError: `path` does not exist afterwards.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            # Content before names: after a crash a name must never lead to a file that is not all there.
            for file in temporary.rglob("*"):
                if file.is_file():
                    flush(file)
            temporary.rename(path)
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is whole or gone under its name, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        path.rename(temporary)
        shutil.rmtree(temporary)


def remove_torn(folder: Path, *, like: str = "*") -> None:
    """Remove what a killed process left half written in `folder`, of names `like` a pattern."""
    with storage_errors(folder):
        for torn in [path for path in folder.glob(like) if is_torn(path)]:
            shutil.rmtree(torn) if torn.is_dir() and not torn.is_symlink() else torn.unlink()


def is_torn(path: Path) -> bool:
    """Whether a path has the name of something half written."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk, whoever raises them, into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", hint="free some space or choose another --output"
        ) from None
    except Exception as error:
        # safetensors reports a full disk as its own error with the system's words in it.
        if "No space left" not in str(error) and "os error" not in str(error):
            raise
        raise StorageError(f"cannot write {path}: {error}", hint="free some space") from None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_hash(paths: Sequence[Path]) -> str:
    """The SHA-256 of a file, or one of those of several in order."""
    hashes = [file_hash(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def describe_files(folder: Path) -> list[dict[str, Any]]:
    """Path (relative to `folder`), size in bytes and SHA-256 of every file below `folder`, in order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [describe_file(file, name=file.relative_to(folder).as_posix()) for file in files]


def describe_file(path: Path, *, name: str | None = None) -> dict[str, Any]:
    """Path, size in bytes and SHA-256 of one file."""
    return {"path": name or str(path), "sha256": file_hash(path), "bytes": path.stat().st_size}


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
