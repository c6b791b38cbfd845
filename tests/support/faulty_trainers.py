"""Trainers that lie: ours with one fault of the catalogue, or one of these, in the processes that it starts.

`A164` here is a trainer with that fault; `ft_A164` is the program that it starts, and `store_A164` its store's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import finetune.run.checkpoints as checkpoints
from finetune.cli import main
from finetune.verify.faults.fault import faults, plant
from finetune.verify.subjects.subject import About, InProcessSubject
from finetune.verify.trainers.ours_program import OurProgram, follow_orders

PROGRAMS = {"ft": main, "store": follow_orders}


class FaultyTrainer(InProcessSubject):
    """Ours with the reference backend; every process of its own has the fault."""

    def __init__(self, fault: str) -> None:
        ours = OurProgram("reference", program=f"{__name__}:ft_{fault}", keeper=f"{__name__}:store_{fault}")
        super().__init__(About(fault, {"it": "1"}, dict.fromkeys(ours.handlers, "")), ours.handlers, [], ours.close)


def report_too_early() -> None:
    """Transformers #29059: a checkpoint's folder has its name before its files are on the disk."""

    def write(right: Any, path: Path, fill: Any) -> None:
        path.mkdir(parents=True)
        fill(path)

    plant(checkpoints, "write_folder", write)


OWN = {"Early": report_too_early}
"""What only a story with a power cut shows."""


def begin(program: str, fault: str) -> None:
    """Run a program with the fault."""
    (OWN[fault] if fault in OWN else faults()[fault].apply)()
    PROGRAMS[program]()


def __getattr__(name: str) -> Callable[[], object]:
    program, _, fault = name.rpartition("_")
    if program in PROGRAMS and fault:
        return partial(begin, program, fault)
    if name in OWN or name in faults():
        return partial(FaultyTrainer, name)
    raise AttributeError(name)
