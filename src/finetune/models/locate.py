"""Finds a model's files: one that ships with FineTune, a local folder, or a repository on the hub."""

import re
from itertools import islice
from pathlib import Path
from typing import Literal

from finetune.errors import ModelError
from finetune.files import run_around
from finetune.models.hub import OFFLINE_HINT, download_model, near_model
from finetune.models.hub import SHIPPED as SHIPPED
from finetune.reading import NotAFileError, check_regular
from finetune.records import ModelLocation

SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "reference_model"
_TEXTS, _LARGEST_TEXT = (".json", ".txt", ".jinja", ".model"), 2**28
"""What is read whole when a model is loaded; the largest vocabularies take a tenth of this."""
_MOST_FILES = 100_000
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
        return ModelLocation(name, folder if place == "shipped" else _checked(folder), place)
    if is_there:
        told = "`ft import` makes a model folder of a GGUF file" if name.endswith(".gguf") else "name its folder"
        if name.endswith((".jsonl", ".csv", ".tsv", ".parquet")):
            told = f"it is data: --data {name}"
        raise ModelError(f"model {name!r} is a file, not a folder with a config.json", hint=told)
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"model folder {name!r} does not exist", hint=near_model(name).strip() or OFFLINE_HINT)
    return ModelLocation(name, _checked(download_model(name, revision)), "hub")


def _checked(named: Path) -> Path:
    folder = named.resolve()
    if not (folder / "config.json").exists():
        run = run_around(named)
        hint = f"of the run in or around it: --model {run}" if run else OFFLINE_HINT
        raise ModelError(f"{named} has no config.json, so it is not a model folder", hint=hint)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no .safetensors weights", hint="convert the model once: save_pretrained(...) writes them"
        )
    # Whoever loads the model opens what it likes of the folder.
    for path in islice(folder.iterdir(), _MOST_FILES):
        try:
            size = 0 if path.is_dir() and path.suffix not in _TEXTS else check_regular(path)
        except (NotAFileError, IsADirectoryError) as error:
            raise ModelError(f"{path}: {error.strerror}", hint="remove it, or get the model again") from None
        except OSError:  # a link that leads nowhere: who needs the file misses it
            continue
        if path.suffix in _TEXTS and size > _LARGEST_TEXT:
            raise ModelError(f"{path} has {size:,} bytes, over {_LARGEST_TEXT:,}", hint="get the model again")
    return folder
