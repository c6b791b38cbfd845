"""Finds the files of a data set and the part each belongs to: a file, a folder, a pattern, or a set on the hub."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.data.read import kind_of
from finetune.data.shipped import data_path
from finetune.data.unpack import PACKED_SUFFIXES, whole_text
from finetune.errors import DataError
from finetune.files import is_run
from finetune.models.hub import hub_refusal

_WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The parts of a data set, and the words in the names of files and folders that say which one is there."""
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")
_PATTERN = re.compile(r"[*?\[]")
_BESIDE = ("readme.", "license.", "licence.", "notice.", "dataset_info", "dataset_dict.", "state.json", ".")
"""How names begin of what lies beside data and is none."""
_MOST_FILES, _DEEPEST = 100_000, 3


@dataclass(frozen=True, slots=True)
class DataSet:
    """The files of a data set in order, and those of its other parts; `valid` names the part to hold out, if any."""

    name: str
    files: tuple[Path, ...]
    others: Mapping[str, tuple[Path, ...]]
    valid: str | None = None


def find_set(name: str) -> DataSet:
    """The files of a data set by its name: `PATH`, a pattern such as `data/*.jsonl`, or `OWNER/NAME` on the hub.

    A folder's files are those to train on: of the part `train` where their names tell parts. `NAME:PART` takes another
    part, and `OWNER/NAME@REVISION:SUBSET:PART` one of the hub. What is there under the whole name goes before that.

    Raises:
        DataError: nothing is there, the files are several sets or of several kinds, or the hub cannot give them.
    """
    path = data_path(name)
    if _is_there(path):
        if is_run(path):
            raise DataError(f"{name} is a run, and no data", hint=f"go on from it: --model {name}")
        return _of_folder(name, path, "") if path.is_dir() else DataSet(name, (path,), {})
    words = name.split(":")
    for count in range(1, len(words)):
        base, part = ":".join(words[:-count]), ":".join(words[-count:])
        found = data_path(base)
        if _is_there(found) and count == 1:
            if found.is_dir():
                return _of_folder(base, found, part)
            raise DataError(f"{base} is a file and has no parts: {name}", hint=f"name the file alone: {base}")
    base, _, part = name.partition(":")
    if _PATTERN.search(base):
        return _of_pattern(base, part)
    return _of_hub(name, base, part) if is_hub_name(base) else DataSet(name, (path,), {})


def is_hub_name(name: str) -> bool:
    """Whether a name that is no path can be one of the hub: owner/name, perhaps with a revision."""
    repository = name.partition("@")[0]
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository)) and not kind_of(Path(repository))


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:  # a loop of links, or a folder that may not be looked into, is told when it is opened
        return not isinstance(error, FileNotFoundError | NotADirectoryError)
    except ValueError:
        return True
    return True


def _of_folder(name: str, folder: Path, part: str) -> DataSet:
    """The files of a folder: saved by `datasets`, or with data files in it."""
    if (folder / "dataset_dict.json").exists():
        splits = _described(folder / "dataset_dict.json", "splits")
        return _chosen(name, {split: _saved(folder / split) for split in splits}, part)
    if (folder / "state.json").exists():
        return _chosen(name, {"train": _saved(folder)}, part)
    names = [path.relative_to(folder).as_posix() for path in islice(_files_below(folder), _MOST_FILES)]
    parts, wanted = parts_of(name, names, _readme_of(folder), part)
    return _chosen(name, {key: tuple(folder / each for each in files) for key, files in parts.items()}, wanted)


def _readme_of(folder: Path) -> str:
    path = folder / "README.md"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(2**20).decode("utf-8", "replace")


def _files_below(folder: Path, depth: int = 1) -> Iterator[Path]:
    """Data files in a folder and in its folders, never through a link to a folder."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}", hint="check its permissions") from None
    for path in entries:
        if path.name.lower().startswith(_BESIDE):
            continue
        if not path.is_dir():
            if kind_of(path):
                yield path
        elif depth < _DEEPEST and not path.is_symlink():
            yield from _files_below(path, depth + 1)


def _saved(folder: Path) -> tuple[Path, ...]:
    """The files of one part that `datasets` saved."""
    listed = _described(folder / "state.json", "_data_files")
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed]
    if not names or not all(isinstance(each, str) and PurePosixPath(each).name == each for each in names):
        raise DataError(f"{folder / 'state.json'} names no files of rows", hint="save the set again: save_to_disk")
    return tuple(folder / str(each) for each in names)


def _described(path: Path, key: str) -> list[Any]:
    try:
        value = json.loads(whole_text(path))
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: broken JSON: {error}", hint="save the set again: save_to_disk") from None
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list) or not found:
        raise DataError(f"{path} has no {key!r}", hint="save the set again: save_to_disk")
    return found


def _of_pattern(name: str, part: str) -> DataSet:
    """The files that a pattern fits; where their names tell several parts, they are these parts."""
    pattern = Path(name).expanduser()
    root = Path(pattern.anchor) if pattern.is_absolute() else Path()
    try:
        fitting = root.glob(str(pattern.relative_to(root)) if pattern.is_absolute() else str(pattern))
        found = [path for path in islice(fitting, _MOST_FILES) if not path.is_dir()]
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{name} is no pattern of paths: {error}", hint="write such as data/*.jsonl") from None
    known = sorted(path for path in found if kind_of(path) and not path.name.lower().startswith(_BESIDE))
    if not known:
        others = f": the {len(found)} files that fit hold no rows" if found else ""
        raise DataError(f"no data file fits {name}{others}", hint="check the pattern, and quote it in a shell")
    named, _ = parts_of(name, [path.as_posix() for path in known], "", part, kind="pattern")
    parts = {key: tuple(map(Path, files)) for key, files in named.items()}
    # Of one part alone these are the rows that were asked for, whatever it is called.
    only = next(iter(parts)) if len(parts) == 1 else ""
    return _chosen(name, parts, part or only)


def parts_of(
    name: str, files: Sequence[str], readme: str, part: str, *, kind: str = "folder"
) -> tuple[dict[str, tuple[str, ...]], str]:
    """Which of a set's files, by their names below it, are of which part; and the part that is meant, if one is.

    The set's own README tells, as on the hub; else the names do, and where none does, all are of `train`.

    Args:
        kind: what the name is of; but for a pattern, folders tell parts, too, and may be sets of their own.

    Raises:
        DataError: there is no file, a name tells two parts or none where others do, or they are several sets.
    """
    deep, what = kind != "pattern", f"{kind} {name}"
    if subsets := _declared(readme):
        subset, patterns, part = _subset(name, subsets, part)
        fitting = {key: tuple(file for file in files if _fits(file, paths)) for key, paths in patterns.items()}
        if any(fitting.values()):
            return {key: found for key, found in fitting.items() if found}, part
        raise DataError(f"{what} has no file of its subset {subset}, which its README names", hint="download it again")
    if not files:
        raise DataError(f"{what} holds no data files", hint="name a folder with .jsonl, .csv or .parquet files in it")
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        parts[_part_of(name, file if deep else PurePosixPath(file).name)].append(file)
    unnamed = parts.get("", [])
    if len(parts) > 1 and unnamed:
        raise DataError(
            f"{what} has parts ({', '.join(sorted(set(parts) - {''}))}), and {len(unnamed)} files whose names tell "
            f"none: {', '.join(unnamed[:20])}",
            hint=f"name the files that are meant one by one, or move the others elsewhere: {unnamed[0]}",
        )
    homes = sorted({home for file in files if (home := _home(file))}) if deep else []
    if len(homes) > 1 or (homes and any(not _home(file) for file in files)):
        raise DataError(
            f"{what} holds several sets: {', '.join(homes[:20])}",
            hint=f"name one of them: {name.rstrip('/')}/{homes[0]}",
        )
    return {key or "train": tuple(found) for key, found in parts.items()}, part


def _home(file: str) -> str:
    """The folder of a file that is a set of its own; "" where it is a part's, or the one for all."""
    folders = [folder for folder in PurePosixPath(file).parts[:-1] if folder != "data" and not _told_by(folder)]
    return folders[0] if folders else ""


def _told_by(text: str) -> set[str]:
    said = set(re.split(r"[^a-z]+", text.lower()))
    return {part for part, words in _WORDS.items() if said & {*words}}


def _stem(file: str) -> str:
    path = PurePosixPath(file)
    return PurePosixPath(path.stem).stem if path.suffix.lower() in PACKED_SUFFIXES else path.stem


def _part_of(name: str, file: str) -> str:
    """The part that a file's name tells, or that of its folder: `train`, the name of a split, or ""."""
    stem = _stem(file)
    shard = _SHARD.fullmatch(stem)
    for text in (stem, *reversed(PurePosixPath(file).parts[:-1])):
        told = _told_by(text)
        if len(told) > 1:
            raise DataError(
                f"{name}: {file} says both {' and '.join(sorted(told))}",
                hint="name it by the part that it is, or alone",
            )
        if told:
            return shard[1] if shard and text == stem else told.pop()
    return ""


def _chosen(name: str, parts: Mapping[str, tuple[Path, ...]], part: str) -> DataSet:
    """The set with the part that is meant, its files whole and of one kind."""
    wanted = part or "train"
    found = _alike(parts, wanted)
    if len(found) != 1:
        known = ", ".join(parts)
        what = f"has several parts of {wanted}: {', '.join(found)}" if found else f"has no part {wanted}, but {known}"
        raise DataError(f"{name} {what}", hint=f"name one: {name}:{(found or [*parts])[0]}")
    [key] = found
    others = {other: files for other, files in parts.items() if other != key}
    held = [] if part else _alike(others, "valid")
    for each in (key, *held):
        _check_whole(name, each, parts[each])
    return DataSet(name if not part else f"{name}:{part}", parts[key], others, held[0] if len(held) == 1 else None)


def _alike(parts: Mapping[str, object], wanted: str) -> list[str]:
    """The parts that a word means: that of this name, or else those whose names tell the same part."""
    if wanted in parts:
        return [wanted]
    meant = _told_by(wanted)
    return [key for key in parts if meant and _told_by(key) == meant]


def _check_whole(name: str, part: str, files: Sequence[Path]) -> None:
    kinds = sorted(
        {"".join(path.suffixes[-2:] if path.suffix.lower() in PACKED_SUFFIXES else [path.suffix]) for path in files}
    )
    if len(kinds) > 1:
        raise DataError(
            f"{name}: the files of its part {part} are of several kinds ({', '.join(kinds)}): which are meant?",
            hint=f"name the files, or those of one kind by a pattern: {files[0].parent}/*{kinds[0]}",
        )
    shards = [found for path in files if (found := _SHARD.fullmatch(_stem(path.name)))]
    wanted = max((int(shard[3]) for shard in shards), default=0)
    there = {int(shard[2]) for shard in shards}
    if missing := [at for at in range(min(wanted, _MOST_FILES)) if at not in there]:
        raise DataError(
            f"{name}: of the {wanted} files of its part {part} {len(missing)} are missing, such as number "
            f"{missing[0]:05d}",
            hint="download the set again, or name the files that are there by a pattern",
        )


Patterns = dict[str, list[str]]


def _declared(readme: str) -> dict[str, Patterns]:
    """The patterns of each part of each subset, as a README's front matter tells them."""
    import yaml

    matter = re.match(r"---\n(.*?)\n---", readme.replace("\r\n", "\n"), re.DOTALL)
    try:
        # Without aliases no text of YAML grows.
        told = yaml.safe_load(matter[1]) if matter and "&" not in matter[1] else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    listed = told.get("configs") if isinstance(told, dict) else None
    subsets: dict[str, Patterns] = {}
    for each in listed if isinstance(listed, list) else ():
        if not isinstance(each, dict) or "config_name" not in each or "data_files" not in each:
            continue
        files, name = each["data_files"], str(each["config_name"])
        entries = (
            files if isinstance(files, list) and all(isinstance(one, dict) for one in files) else [{"path": files}]
        )
        patterns: Patterns = {}
        for entry in entries:
            paths = entry.get("path")
            listing = paths if isinstance(paths, list) else [paths]
            patterns.setdefault(str(entry.get("split", "train")), []).extend(map(str, listing))
        subsets[name] = patterns
        if each.get("default") is True:
            subsets["default"] = patterns
    return subsets


def _subset(name: str, subsets: Mapping[str, Patterns], part: str) -> tuple[str, Patterns, str]:
    """The subset that is meant, its patterns, and the part that is meant in it."""
    first, _, rest = part.partition(":")
    if first in subsets:
        return first, subsets[first], rest
    default = "default" if "default" in subsets else next(iter(subsets))
    if len(subsets) > 1 and default != "default":
        raise DataError(f"{name} has several subsets: {', '.join(subsets)}", hint=f"name one: {name}:{default}")
    return default, subsets[default], part


def _fits(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(file, pattern.replace("**/", "*").removeprefix("./")) for pattern in patterns)


def _of_hub(name: str, base: str, part: str) -> DataSet:
    """The files of a set on the hub, in the hub's own cache; only those of the parts that are read are downloaded."""
    from glob import escape

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, revision = base.partition("@")

    def fetched(wanted: list[str]) -> Path:
        at = revision or None
        return Path(snapshot_download(repository, repo_type="dataset", revision=at, allow_patterns=wanted))

    try:
        folder = fetched(["README.md"])
        try:
            names = HfApi().list_repo_files(repository, revision=revision or folder.name, repo_type="dataset")
        except (OfflineModeIsEnabled, OSError):  # what was downloaded before is there
            names = [path.relative_to(folder).as_posix() for path in _files_below(folder)]
        known = sorted(
            each for each in names if kind_of(Path(each)) and not Path(each).name.lower().startswith(_BESIDE)
        )
        parts, chosen = parts_of(base, known, _readme_of(folder), part, kind="set")
        found = _chosen(base, {key: tuple(folder / each for each in files) for key, files in parts.items()}, chosen)
        wanted = [*found.files, *(found.others[found.valid] if found.valid else ())]
        fetched([escape(path.relative_to(folder).as_posix()) for path in wanted])
    # ValueError: a name that the hub itself does not take, such as a--b.
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        message, hint = hub_refusal(repository, revision or None, error, what="data set")
        raise DataError(message, hint=hint) from None
    return found
