"""What the scenario machines share: the subject they act through, what it is to train, and how its processes die."""

import atexit
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from finetune.verify.deaths import Death
from finetune.verify.ours import Ours
from finetune.verify.subjects import Ending, Look, Task
from finetune_strategies.scratch import lasting_folder
from properties.workplace import QUICK, make_data, make_model

CODES = {
    "kill": -signal.SIGKILL, "power": -signal.SIGKILL, "torn": -signal.SIGXFSZ, "interrupt": 130, "full": 1,
}  # fmt: skip
"""How a process ends that dies so; of a full disk it does not die, but says so."""
QUICK_TASK = {key: value for key, value in QUICK.items() if key not in ("backend", "adapter.rank")}
QUICK_TASK |= {"training.save_every": 2}
ADAPTER = {"adapter.rank": 2, "adapter.dropout": 0.2}
TASKS: dict[str, Mapping[str, Any]] = {
    "plain": ADAPTER,
    "accumulating": ADAPTER | {"training.accumulation": 2, "training.epochs": 3.0, "training.save_every": 1},
    "keeping the best": ADAPTER | {
        "data.valid_fraction": 0.3, "training.keep": "best", "training.evaluate_every": 1, "training.save_every": 3,
        "training.learning_rate": 0.1, "training.stop_after": 4, "training.epochs": 3.0,
    },
    "packing": ADAPTER | {"training.packing": True, "training.epochs": 3.0},
    "whole model": {"adapter.kind": "full", "training.epochs": 1.0, "training.save_every": 1},
}  # fmt: skip
"""What differs from the quick task: each has another way through training, saving and resuming."""


@cache
def place() -> Path:
    """A folder for this session."""
    return lasting_folder("stories")


@cache
def ours(backend: str) -> Ours:
    """Our own trainer, and its nursery of processes, for this session."""
    subject = Ours(backend)
    atexit.register(subject.close)
    return subject


@cache
def task(name: str) -> Task:
    """A task by its name, with a tiny random model and a few rows."""
    model, data = place() / "model", place() / "rows.jsonl"
    if not model.exists():
        make_model(model)
        make_data(data, 11)
    return Task(model, data, {**QUICK_TASK, **TASKS[name]})


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed: what it left, what it says when measured again, how often it changed its folder."""

    look: Look
    measured: str
    changes: int


@cache
def whole(backend: str, name: str) -> Whole:
    """The task, done without any trouble."""
    folder = place() / f"{backend} {name}"
    ending = ours(backend).train(task(name), folder)
    assert ending.code in (0, 1), ending.told
    assert ending.changes is not None
    return Whole(ours(backend).look(folder), measured(ours(backend).evaluate(folder)), ending.changes)


def measured(ending: Ending) -> str:
    """What was measured."""
    assert ending.code == 0, ending.told
    return ending.answer


def deaths(changes: int, *ways: str) -> st.SearchStrategy[Death]:
    """These ways to die, or all, at any of so many changes to the disk, often one of the first; some come too late."""
    return st.builds(Death, st.integers(0, 8) | st.integers(0, changes), st.sampled_from(ways or sorted(CODES)))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; whose turn it is in there is nobody's content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spoil(file: Path, place: int, how: str) -> None:
    """Change one bit of a file, or cut its end off, more than a line's; an empty one grows."""
    old = file.read_bytes()
    at = place % max(1, len(old))
    flipped = old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :] if old else b"x"
    file.write_bytes(flipped if how == "flip" or not old else old[: max(0, at - 1)])
