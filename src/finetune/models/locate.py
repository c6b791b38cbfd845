"""Finds a model's files: one that ships with FineTune, a local folder, or a repository on the hub."""

import re
from pathlib import Path
from typing import Literal

from finetune.errors import ModelError
from finetune.models.hub import OFFLINE_HINT, download_model, near_model
from finetune.models.hub import SHIPPED as SHIPPED
from finetune.records import ModelLocation

SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "reference_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate_model(name: str, *, revision: str | None = None) -> ModelLocation:
    """Find a model by shipped name, local folder or hub id, downloading it into the hub's own cache when needed.

    Raises:
        ModelError: nothing there, not a model folder, the hub cannot be reached, or a revision of what has none.
    """
    try:
        folder = SHIPPED_FOLDER / name if name in SHIPPED else Path(name).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name longer than the disk takes; an unknown home folder
        raise ModelError(f"model folder {name!r} does not exist: {error}", hint=OFFLINE_HINT) from None
    if is_folder and revision is not None:
        raise ModelError(
            f"model.revision is {revision!r}, but {name!r} lies on this machine and has no revisions",
            hint="leave out model.revision, or name a Hub model",
        )
    if is_folder:
        place: Literal["shipped", "local"] = "shipped" if name in SHIPPED else "local"
        return ModelLocation(name, folder if place == "shipped" else _checked(folder.resolve()), place)
    if is_there:
        told = "`ft import` makes a model folder of a GGUF file" if name.endswith(".gguf") else "name its folder"
        if name.endswith((".jsonl", ".csv", ".tsv", ".parquet")):
            told = f"it is data: --data {name}"
        raise ModelError(f"model {name!r} is a file, not a folder with a config.json", hint=told)
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"model folder {name!r} does not exist", hint=f"{near_model(name)}{OFFLINE_HINT}")
    return ModelLocation(name, _checked(download_model(name, revision)), "hub")


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder", hint=OFFLINE_HINT)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no .safetensors weights", hint="convert the model once: save_pretrained(...) writes them"
        )
    return folder
