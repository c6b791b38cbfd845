"""Keeps checkpoints: complete ones only, the newest few and the best, each with a manifest of hashes written last."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import RefusedError
from finetune.files import describe_files, remove_folder, remove_torn, storage_errors, write_folder, write_json
from finetune.reading import read_json

_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "checkpoint.json"
_KEYS = {"step", "best", "identity", "told", "files", "sha256"}


@dataclass(frozen=True, slots=True)
class Owner:
    """What a checkpoint belongs to: `identity` must match for a resume, `told` may differ and is reported."""

    identity: Mapping[str, Any]
    told: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in `folder`.

    The newest `keep` stay, with the one that was the best when each of them was written, the one of the `pinned` step,
    and those in use; all stay where one of the newest is so damaged that it cannot say which the best was. Those of a
    run that was made longer since may belong to settings that it had `earlier`.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, pinned: int = 0, earlier: Sequence[Mapping[str, object]] = ()
    ) -> None:
        self.folder = folder
        self.earlier = earlier
        self.keep = keep
        self.pinned = pinned
        self._in_use: set[int] = set()

    def save(self, step: int, write_state: Callable[[Path], None], owner: Owner, *, best: int | None = None) -> Path:
        """Write the checkpoint of `step`; older ones are removed only when it is complete.

        `open` holds a later reader to the owner's identity, and `changes` tells what else is different. `best` is the
        step whose checkpoint is the best so far; None without one.
        """
        path = self._path(step)
        if (path / _MANIFEST).exists():
            return path

        def fill(folder: Path) -> None:
            write_state(folder)
            manifest = {
                "step": step,
                "best": best,
                "identity": dict(owner.identity),
                "told": dict(owner.told),
                "files": describe_files(folder),
            }
            write_json(folder / _MANIFEST, {**manifest, "sha256": _digest(manifest)})

        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            remove_torn(self.folder)
            if path.is_dir():  # without a manifest, so not a checkpoint
                remove_folder(path)
        # Killed before the rename in here, a torn folder remains, which the next save removes. Killed after it, this
        # checkpoint counts, and too many are kept until the next rotation. No older one goes before this one is whole.
        write_folder(path, fill)
        self._rotate()
        return path

    def release(self) -> None:
        """Let go of the checkpoints that were opened: they are rotated like all others again."""
        self._in_use.clear()
        self._rotate()

    def _rotate(self) -> None:
        steps = self.steps()
        newest = steps[-self.keep :]
        manifests = [_read_manifest(self._path(step)) for step in newest]
        # One that cannot be read any more may have named any of them as the best.
        best = set(steps) if None in manifests else {each["best"] for each in manifests if each}
        for old in sorted(set(steps) - {*newest, *best, self.pinned, *self._in_use}):
            remove_folder(self._path(old))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

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

    def open(self, step: int, identity: Mapping[str, object]) -> Path:
        """The folder of a checkpoint whose every byte is as it was written; it stays until `release`.

        Raises:
            RefusedError: a file was changed, or the checkpoint belongs to another run's settings.
        """
        path = self._path(step)
        manifest = _read_manifest(path)
        found = [file for file in describe_files(path) if file["path"] != _MANIFEST]
        if manifest is None or found != manifest["files"] or manifest["step"] != step:
            raise RefusedError(
                f"checkpoint {path} is damaged: its files are not those that were written",
                hint=f"delete {path} to go on from the checkpoint before it",
            )
        wanted = [identity, *({**identity, **settings} for settings in self.earlier)]
        if all(differing := [differences(manifest["identity"], each) for each in wanted]):
            raise RefusedError(
                f"checkpoint {path} belongs to other settings ({', '.join(differing[0])})",
                hint="resume with the settings it started with",
            )
        self._in_use.add(step)
        return path

    def changes(self, step: int, told: Mapping[str, object]) -> list[str]:
        """What differs from the checkpoint, and may."""
        return differences((_read_manifest(self._path(step)) or {"told": {}})["told"], told)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """`key: old -> new` for each key whose value differs; None for a missing key."""
    keys = [*now, *(key for key in before if key not in now)]
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says; None when it is not, byte for byte of what it says, as we wrote it."""
    try:
        value = read_json(path / _MANIFEST)
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or value.keys() != _KEYS:
        return None
    digest = value.pop("sha256")
    return value if digest == _digest(value) else None


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
