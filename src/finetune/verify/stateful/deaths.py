"""How a process under test dies: at which of its changes to the disk, and by what.

The changes are heard by Python's own audit events, so that the program itself is as its users run it.
"""

import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_HEARD = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_TORN_AFTER = 20
"""How many bytes a write that is cut short still has."""


@dataclass(frozen=True, slots=True)
class Death:
    """A process ends instead of making a change to its folder, after so many others.

    `kill`: by SIGKILL. `power`: so, and of every file what was never flushed is lost. `torn`: by the system, in the
    middle of the next write. `interrupt`: by Ctrl-C. `full`: not at all, but from then on the disk takes nothing more.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    after: int
    by: Literal["kill", "power", "torn", "interrupt", "full"]


CODES = {"kill": -signal.SIGKILL, "power": -signal.SIGKILL, "torn": -signal.SIGXFSZ, "interrupt": 130, "full": 1}
"""How a process ends that dies so; of a full disk it does not die, but says so."""


class CrashInjector:
    """Counts the changes that this process makes in a folder, and lets it die; to be given to `sys.addaudithook`."""

    def __init__(self, folder: Path, death: Death | None) -> None:
        self.changes = 0
        self._folder = os.path.abspath(folder)
        self._death = death
        self._flush = os.fsync
        # How much of each file would outlive a power cut; what was there before this process has been flushed.
        self._safe = {found.st_ino: found.st_size for _, found in self._files()}

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        """Hear an event before it happens."""
        if event not in _HEARD or not self._concerns(event, given):
            return
        if self._death is not None and self.changes == self._death.after:
            death, self._death = self._death, None
            self._die(death, given[0] if event == "open" else "")
        self.changes += 1
        if event in ("os.remove", "os.rename"):
            self._forget(given[0] if event == "os.remove" else given[1], given[-1])

    def flush(self, fd: Any) -> None:
        """Do as `os.fsync`, in whose place this is put, and know what is safe from then on."""
        self._flush(fd)
        found = os.fstat(fd if isinstance(fd, int) else fd.fileno())
        if stat.S_ISREG(found.st_mode):
            self._safe[found.st_ino] = found.st_size

    def _concerns(self, event: str, given: tuple[Any, ...]) -> bool:
        if event == "open" and (isinstance(given[0], int) or not given[2] & _WRITING):
            return False
        # What is named below an open folder is a part of a folder that is being removed.
        below = event != "open" and given[-1] != -1
        path = os.path.abspath(os.fsdecode(given[0]))
        return below or path == self._folder or path.startswith(self._folder + os.sep)

    def _forget(self, path: Any, place: int) -> None:
        """A file's number is given to another one as soon as it is gone."""
        try:
            self._safe.pop(os.stat(path, dir_fd=None if place == -1 else place).st_ino, None)
        except FileNotFoundError:
            return

    def _files(self) -> list[tuple[str, os.stat_result]]:
        paths = (os.path.join(folder, name) for folder, _, names in os.walk(self._folder) for name in names)
        return [(path, os.stat(path)) for path in paths]

    def _die(self, death: Death, path: Any) -> None:
        """End this process; `path` is what it is about to write to, empty where it changes something else."""
        if death.by in ("torn", "full"):
            import resource

            size = os.stat(path).st_size if path and os.path.isfile(path) else 0
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + _TORN_AFTER, most))
            # Python asks the system not to kill for this, and gets an error from the write instead.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if death.by == "torn" else signal.SIG_IGN)
            return
        if death.by == "power":
            for file, found in self._files():
                os.truncate(file, min(found.st_size, self._safe.get(found.st_ino, 0)))
        os.kill(os.getpid(), signal.SIGINT if death.by == "interrupt" else signal.SIGKILL)
