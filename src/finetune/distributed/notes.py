"""What each process of a run writes down for the one that watches them: launchers keep its exit code to themselves."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from finetune.files import write_json

State = Literal["at work", "done", "failed", "lost", "stopped"]
_COMMAND = "command.json"


@dataclass(frozen=True, slots=True)
class Note:
    """How far one process is: `lost` is what it is when another has ended, `stopped` when its launcher ends it."""

    rank: int
    pid: int
    state: State
    exit_code: int = 0
    message: str = ""
    hint: str = ""


def leave_note(folder: Path, note: Note) -> None:
    """Write down how far a process is, in place of what it wrote before."""
    write_json(folder / f"rank-{note.rank}.json", asdict(note))


def read_notes(folder: Path) -> dict[int, Note]:
    """The last note of each process, by its rank."""
    notes = [Note(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("rank-*.json"))]
    return {note.rank: note for note in notes}


def leave_command(folder: Path, command: str) -> None:
    """Write down the command that the user gave."""
    write_json(folder / _COMMAND, command)


def read_command(folder: Path) -> str:
    """The command that the user gave; "" where none was written down."""
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((folder / _COMMAND).read_text(encoding="utf-8")))
    return ""
