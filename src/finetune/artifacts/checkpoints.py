"""Keeps checkpoints: complete ones only, the newest few, each with a manifest of hashes written last."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.artifacts.write import (
    describe_files,
    remove_folder,
    remove_torn,
    storage_errors,
    write_folder,
    write_json,
)
from finetune.errors import RefusedError

_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "checkpoint.json"


class CheckpointStore:
    """The checkpoints of one run, in `folder`, of which the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, write_state: Callable[[Path], None], identity: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`; older ones are removed only when it is complete.

        `identity` says what the checkpoint belongs to; `verify` holds a later reader to it.
        """
        path = self.folder / f"step-{step:08d}"
        if (path / _MANIFEST).exists():
            return path

        def fill(folder: Path) -> None:
            write_state(folder)
            write_json(folder / _MANIFEST, {"step": step, "identity": dict(identity), "files": describe_files(folder)})

        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            remove_torn(self.folder)
            if path.is_dir():
                remove_folder(path)
        write_folder(path, fill)
        for old in self.steps()[: -self.keep]:
            remove_folder(self.folder / f"step-{old:08d}")
        return path

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if (path / _MANIFEST).exists()]
        return sorted(int(name.group(1)) for name in names if name)

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def open(self, step: int, identity: Mapping[str, Any]) -> Path:
        """The folder of a checkpoint whose every byte is as it was written.

        Raises:
            RefusedError: a file was changed, or the checkpoint belongs to another run's settings.
        """
        path = self.folder / f"step-{step:08d}"
        manifest = _read_manifest(path)
        found = [file for file in describe_files(path) if file["path"] != _MANIFEST]
        if manifest is None or found != manifest["files"] or manifest["step"] != step:
            raise RefusedError(
                f"checkpoint {path} is damaged: its files are not those that were written",
                hint=f"delete {path} to go on from the checkpoint before it",
            )
        differing = [key for key in identity if manifest["identity"].get(key) != identity[key]]
        if differing:
            told = ", ".join(f"{key}: {manifest['identity'].get(key)!r} -> {identity[key]!r}" for key in differing)
            raise RefusedError(
                f"checkpoint {path} belongs to other settings ({told})", hint="resume with the settings it started with"
            )
        return path


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says; None when it is not as any manifest of ours is."""
    try:
        value = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(value, dict) and value.keys() == {"step", "identity", "files"}
    return value if sound and isinstance(value["identity"], dict) else None
