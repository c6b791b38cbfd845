"""Our own trainer in processes: the program `ft`, its run folders, and its store of checkpoints."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import RefusedError
from finetune.events import (
    Event,
    FirstGradients,
    FixedLoss,
    HeldOutLoss,
    RunJudged,
    RunResumed,
    StepDone,
    StoppedEarly,
    event_as_dict,
)
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.run.folder import RunFolder
from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.fork_server import ForkServer
from finetune.verify.stateful.lives import Ending, Order, RunSnapshot, Task

[_FT] = entry_points(group="console_scripts", name="ft")
_IMPORTED = (
    f"{_FT.module}.app",
    "finetune.distributed.supervise",
    "finetune.train",
    "finetune.evidence.reopen",
    "finetune.verify.trainers.ours_program",
    "matplotlib.backends.backend_svg",
    "matplotlib.ticker",
    "rich.progress",
    "rich.table",
    "tokenizers",
)
"""What a command may need."""
_COURSE = (FixedLoss, HeldOutLoss, FirstGradients, StepDone, StoppedEarly, RunJudged)
_CLOCKS = ("seconds", "rss", "tokens_per_second")
_SAME = ("plan.yaml", "adapter/", "model/", "checkpoints/")
_OWN = ("id", "started", "command", "timing", "throughput", "peak_rss_bytes", "artifacts")
"""What a run says of itself that another one of the same task would not."""
KEEPER = "finetune.verify.trainers.ours_program:follow_orders"
_OWNER = Owner({"task": "kept"}, {})


class OurProgram:
    """`ft` with one backend, in processes that die as they are told to, and our store of checkpoints.

    Args:
        program, keeper: what runs in a process, as `module:function`; a trainer with a planted fault has others.
    """

    def __init__(self, backend: str, *, program: str = _FT.value, keeper: str = KEEPER) -> None:
        self.backend = backend
        self.program = program
        self.keeper = keeper

    @property
    def handlers(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """A function for each ability that stories need."""
        return {
            "run_process": self._run_process,
            "change_setting": self._change_setting,
            "look": lambda folder: asdict(self.look(Path(folder))),
            "store_process": self._store_process,
            "list_checkpoints": lambda folder: {"checkpoints": self.listed(Path(folder))},
        }

    def _run_process(self, do: str, folder: str, death: Any, task: Any = None) -> dict[str, Any]:
        place, dies = Path(folder), Death(**death) if death else None
        if do == "train":
            whole = Task(Path(task["model"]), Path(task["data"]), task["settings"])
            return asdict(self.train(whole, place, dies))
        return asdict(self.resume(place, dies) if do == "resume" else self.evaluate(place))

    def _change_setting(self, folder: str, key: str, value: object) -> dict[str, Any]:
        self.change(Path(folder), key, value)
        return {}

    def _store_process(self, folder: str, keep: int, orders: Sequence[Any], death: Any) -> dict[str, Any]:
        given = [Order(**order) for order in orders]
        return asdict(self.obey(Path(folder), keep, given, Death(**death) if death else None))

    @cached_property
    def fork_server(self) -> ForkServer:
        """What starts our processes."""
        more = ["peft"] if self.backend == "torch" else []
        return ForkServer([*_IMPORTED, f"finetune.backends.{self.backend}.backend", *more])

    def close(self) -> None:
        """End the process that starts the others, if there is one."""
        if "fork_server" in self.__dict__:
            self.fork_server.close()
            del self.fork_server

    def train(self, task: Task, folder: Path, death: Death | None = None) -> Ending:
        """`ft train`, by a configuration that is put beside the folder."""
        chosen: dict[str, Any] = {"backend": self.backend}
        for key, value in {**task.settings, "model.path": str(task.model), "data.train": str(task.data)}.items():
            section, _, name = key.partition(".")
            chosen.setdefault(section, {})[name] = value
        config = folder.with_name(f"{folder.name}.yaml")
        config.write_text(json.dumps(chosen), encoding="utf-8")
        return self.ft(folder, death, "train", str(config), "--output", str(folder))

    def resume(self, folder: Path, death: Death | None = None) -> Ending:
        """`ft train --resume`."""
        return self.ft(folder, death, "train", "--resume", "--output", str(folder))

    def change(self, folder: Path, key: str, value: object) -> None:
        """Write another value into the plan."""
        plan = RunFolder(folder).plan
        values = yaml.safe_load(plan.read_text(encoding="utf-8"))
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
        plan.write_text(yaml.safe_dump(values), encoding="utf-8")

    def evaluate(self, folder: Path) -> Ending:
        """`ft evaluate`."""
        return self.ft(folder, None, "evaluate", str(folder), "--json")

    def ft(self, folder: Path, death: Death | None, *words: str) -> Ending:
        """Run `ft` with these words; changes in the folder are counted."""
        return self.fork_server.run(self.program, words, folder, death)

    def look(self, folder: Path) -> RunSnapshot:
        """What the run folder holds."""
        run = RunFolder(folder)
        found = {file["path"]: file["sha256"] for file in run.describe()}
        record = run.read_manifest() if run.manifest.exists() else None
        written = record["artifacts"] if record else []
        events = run.read_events()
        return RunSnapshot(
            begun=run.plan.exists(),
            finished=record is not None,
            checkpoints=self.listed(run.checkpoints),
            course=tuple(_timeless(event) for event in events if isinstance(event, _COURSE)),
            resumed=tuple(event.step for event in events if isinstance(event, RunResumed)),
            files={path: mark for path, mark in found.items() if path.startswith(_SAME)},
            names=tuple(found),
            record=_plain(record) if record else {},
            damaged=tuple(file["path"] for file in written if found.get(file["path"]) != file["sha256"]),
        )

    def obey(self, folder: Path, keep: int, orders: Sequence[Order], death: Death | None = None) -> Ending:
        """What each order asks of one `CheckpointStore`."""
        words = [str(folder), str(keep), json.dumps([asdict(order) for order in orders])]
        return self.fork_server.run(self.keeper, words, folder, death)

    def listed(self, folder: Path) -> Mapping[int, str]:
        """Every step of the store, each opened."""
        store = CheckpointStore(folder)
        return {step: _wrong_with(store, step) for step in store.steps()}


def follow_orders() -> None:
    """The program of `OurProgram.obey`: does what the process's arguments say, and prints a line after each order."""
    folder, keep, orders = sys.argv[1:]
    store = CheckpointStore(Path(folder), keep=int(keep))
    for values in json.loads(orders):
        sys.stdout.write(json.dumps(_follow(store, Order(**values))) + "\n")
        sys.stdout.flush()


def _follow(store: CheckpointStore, order: Order) -> Any:
    if order.do == "release":
        store.release()
    elif order.do == "save":
        store.save(order.step, lambda place: _write(place, order.content), _OWNER, best=order.best)
    else:
        try:
            return (store.open(order.step, _OWNER.identity) / "deep" / "state").read_text(encoding="utf-8")
        except RefusedError as error:
            return {"refused": str(error)}
    return None


def _write(place: Path, content: str) -> None:
    (place / "deep").mkdir()
    (place / "deep" / "state").write_text(content, encoding="utf-8")
    (place / "empty").touch()


def _wrong_with(store: CheckpointStore, step: int) -> str:
    """Why a checkpoint cannot be opened by the one it belongs to, whoever that is."""
    try:
        identity = json.loads((store.folder / f"step-{step:08d}" / "checkpoint.json").read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        identity = {}
    try:
        store.open(step, identity)
    except RefusedError as error:
        return str(error)
    return ""


def _timeless(event: Event) -> dict[str, Any]:
    return {key: value for key, value in event_as_dict(event).items() if key not in _CLOCKS}


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in _OWN}
    return {**kept, "notes": [note for note in record["notes"] if "resumed from step" not in note]}
