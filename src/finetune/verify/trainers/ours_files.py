"""How our trainer looks after files, as a subject: checkpoints, files that are replaced, room, configurations."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import files as write
from finetune.config import flatten, load_config
from finetune.errors import FineTuneError
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.verify.trainers.ours_sessions import Handler, OurSessions

_OWNER = Owner({"who": "the suite"}, {})


def file_handlers(trainer: OurSessions) -> dict[str, Handler]:
    """A function for each ability."""
    return {
        "keep_checkpoints": lambda **given: keep_checkpoints(trainer.new_folder(), **given),
        "replace_file": lambda **given: replace_file(trainer.new_folder(), **given),
        "check_room": lambda **given: check_room(trainer.new_folder(), **given),
        "load_config": configured,
    }


def keep_checkpoints(folder: Path, keep: int, orders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Do to one store what each order says.

    Orders: `save` a step with a content, which `best` says was the best so far; `fill`: save one while the disk fills
    up half way; `tear`: what the writer of a step leaves that dies before it is done; `damage`: change a byte of one;
    `open` one.
    """
    store, found, refused = CheckpointStore(folder / "checkpoints", keep=keep), [], []
    for order in orders:
        said, why = "", ""
        try:
            said = _follow(store, **order)
        except (FineTuneError, OSError) as error:
            why = str(error) or type(error).__name__
        found.append(said)
        refused.append(why)
    return {"found": found, "refused": refused, "listed": store.steps()}


def _follow(store: CheckpointStore, do: str, step: int, content: str = "", best: int | None = None) -> str:
    path = store.folder / f"step-{step:08d}" / "state"

    def fill(place: Path) -> None:
        text = content[: len(content) // 2] if do == "fill" else content
        (place / path.name).write_text(text, encoding="utf-8")
        if do == "fill":
            raise OSError(errno.ENOSPC, "No space left on device")

    if do == "open":
        return (store.open(step, _OWNER.identity) / path.name).read_text(encoding="utf-8")
    if do in ("save", "fill"):
        store.save(step, fill, _OWNER, best=best)
    elif do == "tear":
        path.parent.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")
    elif do == "damage":
        text = path.read_text(encoding="utf-8")
        path.write_text(chr(ord(text[0]) ^ 1) + text[1:], encoding="utf-8")
    return ""


def replace_file(folder: Path, before: str, after: str, room: int) -> dict[str, Any]:
    """Put a text at a place that holds another one, on a disk that takes so many letters of it and no more."""
    path = folder / "file"
    write.write_text(path, before)

    def fill(place: Path) -> None:
        place.write_text(after[:room], encoding="utf-8")
        if room < len(after):
            raise OSError(errno.ENOSPC, "No space left on device")

    try:
        write.write_file(path, fill)
    except FineTuneError:
        return {"text": path.read_text(encoding="utf-8"), "refused": True}
    return {"text": path.read_text(encoding="utf-8"), "refused": False}


def check_room(folder: Path, wanted: int) -> dict[str, Any]:
    """See, before a model is merged or written, that the disk takes it."""
    write.check_space(folder / "merged", wanted, smaller="write less")
    return {}


def configured(file: str) -> dict[str, Any]:
    """What `ft check` takes from a file."""
    loaded = load_config(Path(file), environ={}, overrides={}, profile=None)
    return {"told": "", "effective": json.loads(json.dumps(dict(flatten(loaded.config))))}
