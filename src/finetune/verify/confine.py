"""Keeps this process inside a folder while a stranger's file is tried: a change to anything outside is refused."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGED: dict[str, tuple[int, ...]] = {
    "open": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "shutil.rmtree": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
}
"""Audit events that change files, each with the arguments that name what is changed."""
_scratch: list[str] = []
_installed: list[bool] = []


class OutsideError(PermissionError):
    """Something outside of the scratch folder was about to be changed."""


def _hear(event: str, given: tuple[Any, ...]) -> None:
    if not _scratch or event not in _CHANGED or (event == "open" and not given[2] & _WRITING):
        return
    for place in _CHANGED[event]:
        name = given[place]
        if isinstance(name, int) or (event != "open" and _below_open_folder(event, given, place)):
            continue
        path = os.path.abspath(os.fsdecode(name))
        # Of an opened file the link is followed; of any other change only the folders above the name are.
        real = os.path.realpath(path)
        if event not in ("open", "os.truncate", "os.chmod", "os.chown", "os.utime"):
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if not real.startswith(_scratch[-1] + os.sep) and real != os.devnull:
            raise OutsideError(f"{event} of {path!r}, which is outside of the scratch folder of this replay")


def _below_open_folder(event: str, given: tuple[object, ...], place: int) -> bool:
    """Whether a name is relative to a folder that was opened, as those are that `shutil.rmtree` removes."""
    if event in ("os.rename", "os.link"):
        return bool(given[2 + place] != -1)
    return bool(isinstance(given[-1], int) and given[-1] != -1 and event != "os.truncate")


@contextlib.contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Let this process change nothing outside of a folder for as long as this is open; others are not affected.

    Raises:
        OutsideError: in the place of a change outside.
    """
    if not _installed:
        sys.addaudithook(_hear)
        _installed.append(True)
    _scratch.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _scratch.pop()


def confined_to(folder: Path, subject: str) -> contextlib.AbstractContextManager[None]:
    """`confined`, unless the subject is a class of the user's own: it runs in this process, and may write anywhere."""
    return contextlib.nullcontext() if ":" in subject else confined(folder)
