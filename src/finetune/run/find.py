"""Finds a run by its path, its id, the beginning of its id, or the word `latest`; and lists those there are."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.config import load_plan
from finetune.data.sources import shown_names
from finetune.errors import FineTuneError, OutputError
from finetune.files import is_run, run_around
from finetune.models.hub import SHIPPED
from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder

RUNS = Path("runs")
LATEST = "latest"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `ft runs` lists of a run; `outcome` is its verdict, or `unfinished`, or `unreadable` with the reason."""

    id: str
    folder: Path
    model: str
    data: str
    outcome: str
    started: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "folder": str(self.folder)}


def find_run(name: str | Path) -> Path:
    """The folder of the run that is meant: a path of it or into it, an id below `runs/` or how one begins, `latest`.

    The latest is the finished run that ended last; where none is finished, the one that logged last.

    Raises:
        OutputError: there is no such run, or more than one; the hint names the nearest, or what the path is instead.
    """
    text = str(name)
    try:
        path = Path(text).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"run {text[:80]!r} cannot be looked for: {error}", hint="`ft runs` lists them") from None
    if is_there:
        if run := next((place for place in (path, *path.parents) if is_run(place)), None):
            return run
        told = "holds no run (no run.json, no plan.yaml)" if path.is_dir() else "is a file, and no file of a run"
        raise OutputError(f"{path} {told}", hint=_what_it_is(path))
    home = path.parent if len(path.parts) > 1 and path.parent.is_dir() else RUNS
    known = {place.name: place for place in _folders(home)}
    if text == LATEST and known:
        return max(known.values(), key=lambda place: ((place / "run.json").exists(), _last_change(place)))
    found = sorted(known[each] for each in known if each.startswith(path.name) and path.name)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(place.name for place in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise OutputError(
            f"{len(found)} runs in {home} begin with {path.name!r}: {listed}", hint="write more of the one you mean"
        )
    if text in SHIPPED:
        raise OutputError(f"{text} is a model, and no run", hint=f"train it: ft train --model {text}")
    near = get_close_matches(path.name, [LATEST, *known], n=1) if known else []
    hint = f"did you mean {known.get(near[0], LATEST)}? " if near else ""
    hint += "`ft runs` lists them" if known else "`ft train` makes one"
    raise OutputError(f"run {text} does not exist, here or below {home}/", hint=hint)


def _what_it_is(path: Path) -> str:
    """What a path is that is no run, and the line that takes it."""
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return f"it is an adapter; judge one from elsewhere: ft judge --tuned {path} --train FILE"
    if path.is_dir() and (path / "config.json").is_file():
        return f"it is a model; train it: ft train --model {path}"
    if path.suffix in (".yaml", ".yml"):
        return f"it is a configuration; train with it: ft train {path}"
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return f"it is data; train on it: ft train --data {path}"
    if path.is_dir() and (run := run_around(path)):
        return f"it holds runs: ft report {run}"
    return "`ft runs` lists the runs below runs/"


def base_beside(adapter: Path) -> str | None:
    """The base that the run of an adapter was planned with; None of one that lies elsewhere."""
    run = RunFolder(adapter.resolve().parent)
    if adapter.resolve() != run.adapter or not run.plan.is_file():
        return None
    return load_plan(run.plan).config.model.path


def list_runs(home: Path = RUNS) -> list[RunSummary]:
    """Every run in a folder of runs, the newest first; one that cannot be read is listed with what is wrong."""
    return [_summary(place) for place in sorted(_folders(home), key=_last_change, reverse=True)]


def _folders(home: Path) -> Iterable[Path]:
    return [place for place in home.iterdir() if is_run(place)] if home.is_dir() else []


def _last_change(path: Path) -> tuple[float, str]:
    """When a run ended or, of an unfinished one, logged something; runs of one moment in the order of their names."""
    run = RunFolder(path)
    file = next((each for each in (run.manifest, run.events, run.plan) if each.exists()), path)
    return file.stat().st_mtime, path.name


def _summary(path: Path) -> RunSummary:
    run = RunFolder(path)
    try:
        if run.manifest.exists():
            told = run.read_manifest()
            files = [str(each.get("path")) for each in told["data"].get("files") or ()]
            outcome, started = str(told.get("outcome")), str(told.get("started") or "")
            return RunSummary(path.name, path, str(told["model"].get("name")), "".join(files[:1]), outcome, started)
        config = load_plan(run.plan).config
        begun = run.begun()
        newest = CheckpointStore(run.checkpoints).newest()
        note = f"step {newest} is saved" if newest else "no checkpoint"
        return RunSummary(
            path.name,
            path,
            config.model.path,
            shown_names(config.data.train or "shipped:facts"),
            "unfinished",
            begun.started if begun else "",
            note,
        )
    except (FineTuneError, OSError) as error:
        note = error.message if isinstance(error, FineTuneError) else str(error)
        return RunSummary(path.name, path, "", "", "unreadable", "", note.partition("\n")[0])


def age(started: str, now: datetime) -> str:
    """How long ago a run began, in its largest unit; empty where that is not known."""
    try:
        seconds = (now - datetime.fromisoformat(started)).total_seconds()
    except (ValueError, TypeError):
        return ""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if (count := int(seconds // size)) > 0:
            return f"{count} {unit}{'s' * (count > 1)}"
    return "now"
