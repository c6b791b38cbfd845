"""What is said of a model in files that travel: never where it lies on this machine."""

import json
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from finetune.files import files_hash
from finetune.models.shape import weight_files
from finetune.records import ModelLocation

_PLACES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Settings in which libraries write where a model lies."""
_CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([\w.-]+)")
_HASHED = re.compile(r"(.+) \(sha256 ([0-9a-f]{16})\)")
_PATH = re.compile(r"(\w+://\S+)|(?<![\w.:/<-])(?:/[^\s/'\"`|:,;()<>]+){2,}/?|\b[A-Za-z]:\\[^\s'\"`|,;()<>]+")
_MOST_READ = 20_000_000


def hub_id(folder: Path) -> str:
    """The hub id of a model whose folder lies in the hub's own cache; "" of any other."""
    kept = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    found = _CACHED.fullmatch(kept)
    return "/".join(found.groups()) if found else ""


def public_name(location: ModelLocation) -> str:
    """What a base is called where its adapter goes: its hub id or shipped name, else its folder's name and a hash.

    With the hash no name can be taken for one of the hub's.
    """
    if location.source != "local":
        return location.name
    return hub_id(location.folder) or _named(location.folder, _weights_mark(tuple(weight_files(location.folder))))


def _named(folder: Path, mark: str) -> str:
    return f"{folder.name} (sha256 {mark})"


def is_hashed(named: str) -> bool:
    """Whether a name is one of a folder's with a hash, which says what a base is and not where."""
    return _HASHED.fullmatch(named) is not None


def _weights_mark(files: tuple[Path, ...]) -> str:
    return _mark(files, tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _mark(files: tuple[Path, ...], changed: tuple[tuple[int, int], ...]) -> str:
    """Of weights that have not changed since they are not read again."""
    return files_hash(files)[:16]


def without_places(content: bytes, base: str = "") -> bytes:
    """A JSON file's content with the base's hub id, or the folder's name, for each absolute path of a model's."""
    if len(content) > _MOST_READ or b'name_or_path"' not in content:
        return content
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = {key: values[key] for key in _PLACES if isinstance(values, dict) and isinstance(values.get(key), str)}
    changed = {key: base or hub_id(Path(place)) or _last(place) for key, place in places.items() if _is_place(place)}
    return (json.dumps({**values, **changed}, indent=2, ensure_ascii=False) + "\n").encode() if changed else content


def words_without_places(text: str) -> str:
    """Words of people's, in which an absolute path is its last part."""
    return _PATH.sub(lambda found: found[1] or _last(found[0]), text)


def _is_place(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _last(place: str) -> str:
    return (PureWindowsPath(place) if "\\" in place else PurePosixPath(place)).name
