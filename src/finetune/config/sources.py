"""Gather what a file, the environment and the flags say, and judge each value where it stands."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from finetune.config.keys import (
    KEYS,
    PROFILE_KEY,
    SECTIONS,
    VALUES_ELSEWHERE,
    accepts_null,
    accepts_text,
    allowed_items,
    allowed_words,
    default_of,
    expectation,
    nearest_key,
    parse_value,
    split_key,
)
from finetune.config.profiles import PROFILES
from finetune.config.yaml_file import YamlFile, read_scalar
from finetune.errors import ConfigError, Problem

Origin = Literal["default", "profile", "file", "environment", "flag", "derived"]

RESERVED_VARIABLES = frozenset({"FT_REAL_MODEL_ENABLE", "FT_TEST_MODEL", "FT_E2E_MODEL_ID", "FT_VERBOSE", "FT_LAUNCH"})
"""Variables that begin with FT_ and are no settings."""

_NULL_WORDS = ("", "null", "Null", "NULL", "~")


@dataclass
class ConfigSource:
    """One place that settings come from: its good values by dotted key, and its problems."""

    origin: Origin
    place: Callable[[str], str]
    suggest: Callable[[str, str], str]
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, key: str, value: Any) -> None:
        """Take in one raw value; sections are taken apart, and what is wrong becomes a problem."""
        if key in SECTIONS:
            self._add_section(key, value)
        elif key in KEYS or key == PROFILE_KEY:
            self._add_setting(key, value)
        else:
            self.problems.append(
                Problem(f"there is no setting `{key}`", self.place(key), self.suggest(key, nearest_key(key) or ""))
            )

    def _add_section(self, section: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self.add(f"{section}.{name}", inner)
        elif section == "template" and isinstance(value, str):
            self.add("template.name", value)
        elif value is not None:
            what = f"`{section}` holds a group of settings, but is {shown(value)}"
            first = next(iter(SECTIONS[section].model_fields))
            hint = f"write `{first}: ...` indented below `{section}:`"
            self.problems.append(Problem(what, self.place(section), hint))

    def _add_setting(self, key: str, value: Any) -> None:
        if key in self._seen:
            self.problems.append(Problem(f"`{key}` is given twice", self.place(key), "keep one of the two"))
            return
        self._seen.add(key)
        if key == PROFILE_KEY:
            problem = profile_problem(value, self.place(key))
            self.problems += [problem] if problem else []
            self.values[key] = value
            return
        try:
            self.values[key] = parse_value(key, value)
        except ValueError:
            what = f"{split_key(key)[1]} must be {expectation(key)}; it is {shown(value)}"
            self.problems.append(Problem(what, self.place(key), _value_hint(key, value)))


def file_source(file: YamlFile) -> ConfigSource:
    """The settings of a YAML file."""
    source = ConfigSource("file", file.place, _suggest_in_file, problems=list(file.problems))
    for key, value in file.values.items():
        name = str(key)
        if "." in name:
            section, inner = name.split(".", 1)
            what, hint = f"there is no setting `{name}` at the top", f"write `{inner}:` indented below `{section}:`"
            source.problems.append(Problem(what, file.place(name), hint))
        else:
            source.add(name, value)
    return source


def environment_source(environ: Mapping[str, str]) -> ConfigSource:
    """The settings of `FT_SECTION__KEY` variables; an empty variable counts as not set."""
    variables: dict[str, str] = {}
    source = ConfigSource("environment", lambda key: variables.get(key, _variable(key)), _suggest_in_environment)
    for variable in sorted(environ):
        if not variable.startswith("FT_") or variable in RESERVED_VARIABLES or not environ[variable]:
            continue
        key = variable.removeprefix("FT_").lower().replace("__", ".")
        if "." not in key and key not in (*SECTIONS, *KEYS, PROFILE_KEY) and not _looks_like_ours(variable):
            continue  # FT_SOMETHING may belong to another program; only a near miss of ours is refused.
        variables[key] = variable
        source.add(key, read_word(key, environ[variable]))
    return source


def flag_source(overrides: Mapping[str, Any], profile: str | None) -> ConfigSource:
    """The settings of flags, by dotted key; hyphens in keys mean underscores."""
    source = ConfigSource("flag", lambda key: f"--set {key}", _suggest_dotted)
    for key, value in overrides.items():
        source.add(key.replace("-", "_"), value)
    if profile is not None:
        problem = profile_problem(profile, "--profile")
        source.problems += [problem] if problem else []
        source.values[PROFILE_KEY] = profile
    return source


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Overrides from `key=value` words; the last one wins, values are read as YAML. Raises ConfigError."""
    overrides: dict[str, Any] = {}
    problems: list[Problem] = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        key = name.strip().replace("-", "_")
        if equals and key:
            overrides[key] = read_word(key, text)
        else:
            what, hint = f"{shown(assignment)} assigns nothing", "write `--set key=value`, e.g. `--set training.seed=3`"
            problems.append(Problem(what, f"--set {assignment}", hint))
    if problems:
        raise ConfigError(problems)
    return overrides


def read_word(key: str, text: str) -> Any:
    """A value typed in a shell: for a setting that takes free text, `0123` and `a: b` stay as they are typed."""
    key = "template.name" if key == "template" else key
    if key not in KEYS or not accepts_text(key) or text.lstrip()[:1] in ("'", '"'):
        return read_scalar(text)
    return None if text.strip() in _NULL_WORDS else text


def profile_problem(name: object, where: str) -> Problem | None:
    """Why this cannot be the profile, if it cannot; None means no profile."""
    if name is None or (isinstance(name, str) and name in PROFILES):
        return None
    near = get_close_matches(name, list(PROFILES), n=1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]}?" if near else "choose one of " + ", ".join(PROFILES)
    return Problem(f"there is no profile {shown(name)}", where, hint)


def shown(value: object) -> str:
    """A value as Python writes it, cut at 80 characters; never slow, whatever its size."""
    if value is None:
        return "empty (null)"
    try:
        text = repr(value) if isinstance(value, str) and len(value) < 100 else _BOUNDED.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


_BOUNDED = reprlib.Repr()
_BOUNDED.maxstring = _BOUNDED.maxother = 90
_BOUNDED.maxlong = 90
_BOUNDED.maxlevel = 3


def _value_hint(key: str, value: object) -> str:
    if isinstance(value, str) and (key, value.lower()) in VALUES_ELSEWHERE:
        return VALUES_ELSEWHERE[key, value.lower()]
    words = allowed_words(key)
    near = get_close_matches(value, words, n=1) if isinstance(value, str) else []
    if near:
        return f"did you mean {near[0]}?"
    if near_item := _near_item(key, value):
        return f"write a list: [{near_item}]"
    if value == "None" and accepts_null(key):
        return "write null for no value"
    if accepts_text(key) and value is not None and not isinstance(value, (str, list, dict)):
        return "put it in quotes if it is meant as text"
    default = default_of(key)
    shown_default = "null" if default is None else list(default) if isinstance(default, tuple) else default
    return f"leave it out for the default, {shown_default}"


def _near_item(key: str, value: object) -> str | None:
    """The word of a list that somebody who wrote one word, or several with commas, most likely meant."""
    words = allowed_items(key)
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    near = [found for part in parts for found in get_close_matches(part, words, n=1)]
    return ", ".join(near) if parts and len(near) == len(parts) else None


def _suggest_in_file(wrong: str, nearest: str) -> str:
    section, name = split_key(wrong)
    home, near_name = split_key(nearest)
    if not nearest:
        return _list_names(section)
    if home == section or not home:
        return f"did you mean {near_name}?"
    return f"`{name}` belongs in `{home}`" if near_name == name else f"did you mean {near_name} in `{home}`?"


def _suggest_in_environment(wrong: str, nearest: str) -> str:
    if "." not in wrong:  # FT_TRAINING_SEED: one underscore too few, most often
        near = get_close_matches(_variable(wrong), list(_single_underscored()), n=1)
        return f"did you mean {_single_underscored()[near[0]]}?" if near else _list_names("")
    return f"did you mean {_variable(nearest)}?" if nearest else _list_names(split_key(wrong)[0])


def _suggest_dotted(wrong: str, nearest: str) -> str:
    return f"did you mean {nearest}?" if nearest else _list_names(split_key(wrong)[0])


def _list_names(section: str) -> str:
    if section in SECTIONS:
        return f"`{section}` has: " + ", ".join(SECTIONS[section].model_fields)
    return "there are: " + ", ".join([*SECTIONS, *(key for key in KEYS if "." not in key), PROFILE_KEY])


def _variable(key: str) -> str:
    return "FT_" + key.upper().replace(".", "__")


def _single_underscored() -> dict[str, str]:
    ours = [_variable(key) for key in (*KEYS, PROFILE_KEY)]
    return {variable.replace("__", "_"): variable for variable in ours}


def _looks_like_ours(variable: str) -> bool:
    return bool(get_close_matches(variable.upper(), list(_single_underscored()), n=1, cutoff=0.85))
