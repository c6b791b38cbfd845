"""A trainer that is a command, written down in a TOML file: what is called, what it writes, and what it tells."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.config import KEYS
from finetune.errors import ConfigError, Problem, UsageError
from finetune.files import meant_file
from finetune.reading import read_text

_PLACE = re.compile(r"\{([a-z][a-z_]*(?:\.[a-zA-Z_.-]+)?)\}")
_ALWAYS = ("model", "output", "python", "scale")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("data",),
    "resume": ("data", "checkpoint", "remaining"),
    "evaluate": ("data", "adapter"),
    "merge": ("adapter",),
    "generate": ("adapter", "prompt"),
}
"""What stands for something in each command, beside what always does, the settings and the files."""
Words = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
Pattern = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Called(_Part):
    """A command: its arguments, with names in braces for what changes; files that are written for it, by name.

    Attributes:
        rows: pairs of `prompt` and `completion` as they are, as one list of `messages`, or each as a list of messages.
        data: the name of the file of rows, in the folder that `{data}` stands for.
        answer: of `evaluate` and `generate`, a regular expression for what is printed; its first group is the answer.
    """

    argv: Words
    files: dict[str, str] = Field(default_factory=dict)
    data: str = "train.jsonl"
    rows: Literal["pairs", "messages", "conversations"] = "pairs"
    answer: Pattern | None = None
    seconds: Annotated[float, Field(gt=0, strict=False)] = 300.0


class StepPattern(_Part):
    """What is told of each step, by a regular expression with the groups `loss`, `learning_rate` and `step`.

    Attributes:
        line: is looked for in each line that is printed, or in each of `file`, below the output folder.
    """

    line: Pattern
    file: str | None = None


class CommandFile(_Part):
    """What a TOML file says of a trainer.

    Attributes:
        format: of its adapters: PEFT's or mlx-lm's.
        adapter: the folder of the adapter, below the output folder.
        checkpoints: a regular expression for the paths of checkpoints below the output folder, with a group `step`.
        settings: what is in force where a law does not say; a setting without a place in a command has this value only.
        refuses: the exit codes by which it refuses.
        version: a command that prints its version.
    """

    name: Annotated[str, Field(min_length=1)]
    format: Literal["peft", "mlx"] = "peft"
    adapter: str = "."
    checkpoints: Pattern | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    refuses: Annotated[tuple[int, ...], Field(strict=False)] = (2,)
    version: Words | None = None
    told: StepPattern | None = None
    train: Called
    resume: Called | None = None
    evaluate: Called | None = None
    merge: Called | None = None
    generate: Called | None = None

    @property
    def commands(self) -> dict[str, Called]:
        """Its commands by the ability that each is for."""
        return {name: getattr(self, name) for name in _NAMES if getattr(self, name) is not None}


def load_command(path: Path) -> CommandFile:
    """Read a file; every problem in it is told at once, with its place.

    Raises:
        UsageError: there is no such file, or it is no TOML.
        ConfigError: what is wrong in it.
    """
    try:
        given = tomllib.loads(read_text(path))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", hint=meant_file(path, "name the TOML file of a subject")
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deep
        raise UsageError(f"{path} is no TOML: {error}", hint="docs/your-trainer.md shows what it looks like") from None
    problems = []
    read: CommandFile | None = None
    try:
        read = CommandFile.model_validate(given)
    except ValidationError as error:
        problems += [_told(path, each) for each in error.errors()]
    problems += list(_problems(path, given))
    if problems or read is None:
        raise ConfigError(problems)
    return read


def named(text: str) -> list[str]:
    """What stands in braces in a text, for something that changes."""
    return [match[1] for match in _PLACE.finditer(text)]


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with what stands in braces replaced; other braces are left as they are."""
    return _PLACE.sub(lambda match: values[match[1]], text)


def _told(path: Path, error: Any) -> Problem:
    """What pydantic found, in the words of the house."""
    place = ".".join(str(part) for part in error["loc"])
    hint = ""
    if error["type"] == "extra_forbidden":
        owner = Called if error["loc"][0] in _NAMES else StepPattern if error["loc"][0] == "told" else CommandFile
        near = get_close_matches(str(error["loc"][-1]), list(owner.model_fields), n=1)
        choices = ", ".join(owner.model_fields)
        hint = f"did you mean {near[0]}?" if near else f"choose from: {choices}"
        return Problem("there is no such key", f"{path}: {place}", hint)
    return Problem(error["msg"].lower(), f"{path}: {place}", hint)


def _problems(path: Path, given: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong beside the form: names in braces, settings and regular expressions."""
    for key in given.get("settings", {}) if isinstance(given.get("settings"), dict) else ():
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`ft schema` has all settings"
            yield Problem("there is no such setting", f"{path}: settings.{key}", hint)
    for ability, others in _NAMES.items():
        called = given.get(ability)
        if isinstance(called, dict):
            yield from _unknown_names(path, ability, called, (*_ALWAYS, *others))
            yield from _bad_pattern(path, f"{ability}.answer", called.get("answer"), groups=())
    step = given.get("told")
    yield from _bad_pattern(path, "told.line", step.get("line") if isinstance(step, dict) else None, groups=("loss",))
    yield from _bad_pattern(path, "checkpoints", given.get("checkpoints"), groups=("step",))
    if "resume" in given and "checkpoints" not in given:
        hint = "checkpoints = 'checkpoint-(?P<step>[0-9]+)', for example"
        yield Problem("to resume, a command must know from where", f"{path}: resume", hint)


def _unknown_names(path: Path, ability: str, called: Mapping[str, object], known: tuple[str, ...]) -> Iterator[Problem]:
    files = called.get("files") if isinstance(called.get("files"), dict) else {}
    assert isinstance(files, dict)
    argv = called.get("argv")
    texts = {f"{ability}.argv": " ".join(map(str, argv)) if isinstance(argv, list) else ""}
    texts |= {f"{ability}.files.{name}": str(text) for name, text in files.items()}
    choices = [*known, *(f"files.{name}" for name in files), *(f"settings.{key}" for key in KEYS)]
    for place, text in texts.items():
        for name in named(text):
            if name not in choices:
                near = get_close_matches(name, choices, n=1)
                hint = f"did you mean {{{near[0]}}}?" if near else f"known here: {', '.join(known)}, settings and files"
                yield Problem(f"nothing is known as {{{name}}}", f"{path}: {place}", hint)


def _bad_pattern(path: Path, place: str, pattern: object, *, groups: tuple[str, ...]) -> Iterator[Problem]:
    if not isinstance(pattern, str):
        return
    try:
        found = re.compile(pattern)
    except re.error as error:
        yield Problem(f"no regular expression: {error}", f"{path}: {place}", "quote it as '...', so that \\ stays")
        return
    for group in groups:
        if group not in found.groupindex:
            yield Problem(f"it has no group {group!r}", f"{path}: {place}", f"write (?P<{group}>...) around it")
    if not groups and not found.groups:
        yield Problem("it has no group for the answer", f"{path}: {place}", "write (...) around it")
