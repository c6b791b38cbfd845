"""Load a configuration: defaults < profile < file < environment < flags, every problem reported at once."""

import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.config.keys import (
    KEYS,
    PROFILE_KEY,
    SECTIONS,
    VALUES_ELSEWHERE,
    accepts_text,
    choices_of,
    default_of,
    expectation,
    nearest_key,
    split_key,
    unflatten,
)
from finetune.config.profiles import PROFILES
from finetune.config.schema import TrainingConfig
from finetune.config.yaml_file import YamlFile, read_scalar, read_yaml
from finetune.errors import ConfigError, Problem

Origin = Literal["default", "profile", "file", "environment", "flag", "derived"]

RESERVED_VARIABLES = frozenset({"FT_REAL_MODEL_ENABLE", "FT_TEST_MODEL", "FT_E2E_MODEL_ID", "FT_VERBOSE", "FT_LAUNCH"})
"""Variables that begin with FT_ and are no settings."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration and, by dotted key, where each of its values came from."""

    config: TrainingConfig
    origins: Mapping[str, Origin]


def load_config(
    path: Path | YamlFile | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    profile: str | None = None,
) -> LoadedConfig:
    """Load a YAML file, `FT_SECTION__KEY` variables and flags (`overrides`, by dotted key) into one configuration.

    Args:
        environ: where the variables are looked for; by default in this process's environment.

    Raises:
        ConfigError: every problem of every source, each with its place and a hint.
    """
    environ = os.environ if environ is None else environ
    overrides = overrides or {}
    # Weakest first; values that a stronger source hides are judged all the same.
    sources = [environment_source(environ), flag_source(overrides, profile)]
    if path is not None:
        sources.insert(0, file_source(path if isinstance(path, YamlFile) else read_yaml(Path(path))))
    if problems := [problem for source in sources for problem in source.judged()]:
        raise ConfigError(problems)
    named: str | None = None
    for source in sources:
        named = source.values.pop(PROFILE_KEY, named)
    values = dict(PROFILES[named].values) if named is not None else {}
    origins: dict[str, Origin] = {**dict.fromkeys(KEYS, "default"), **dict.fromkeys(values, "profile")}
    for source in sources:
        values.update(source.values)
        origins.update(dict.fromkeys(source.values, source.origin))
    return LoadedConfig(unflatten(values), origins)


@dataclass
class ConfigSource:
    """One place that settings come from: its raw values by dotted key, and what is wrong, as it is written.

    `place` tells where a key stands there, and `suggest` how a nearest key would be written there.
    """

    origin: Origin
    place: Callable[[str], str]
    suggest: Callable[[str, str], str]
    values: dict[str, Any] = field(default_factory=dict)
    found: list[str | Problem] = field(default_factory=list)

    def refuse(self, what: str, key: str, hint: str) -> None:
        """Note what is wrong with a key."""
        self.found.append(Problem(what, self.place(key), hint))

    def add(self, key: str, value: object) -> None:
        """Take in one raw value; sections are taken apart, and what is no setting becomes a problem."""
        if key == "template" and isinstance(value, str):
            key = "template.name"
        if key in SECTIONS and isinstance(value, Mapping):
            for name, inner in value.items():
                self.add(f"{key}.{name}", inner)
        elif key in SECTIONS and value is not None:
            first = next(iter(SECTIONS[key].model_fields))
            hint = f"write `{first}: ...` indented below `{key}:`"
            self.refuse(f"`{key}` holds a group of settings, but is {shown(value)}", key, hint)
        elif key in SECTIONS:
            return
        elif key not in KEYS and key != PROFILE_KEY:
            self.refuse(f"there is no setting `{key}`", key, self.suggest(key, nearest_key(key) or ""))
        elif key in self.values:
            self.refuse(f"`{key}` is given twice", key, "keep one of the two")
        else:
            self.values[key] = value
            self.found.append(key)

    def judged(self) -> list[Problem]:
        """What is wrong with this source, in the order in which it stands there."""
        try:
            unflatten({key: value for key, value in self.values.items() if key != PROFILE_KEY})
            refused: set[str] = set()
        except ValidationError as error:
            places = [problem["loc"] for problem in error.errors(include_context=False, include_input=False)]
            refused = {".".join(map(str, place[: 2 if place[0] in SECTIONS else 1])) for place in places}
        problems = []
        for entry in self.found:
            if isinstance(entry, Problem):
                problems.append(entry)
            elif entry == PROFILE_KEY:
                problems += _profile_problems(self.values[entry], self.place(entry))
            elif entry in refused:
                value = self.values[entry]
                what = f"{split_key(entry)[1]} must be {expectation(entry)}; it is {shown(value)}"
                problems.append(Problem(what, self.place(entry), _value_hint(entry, value)))
        return problems


def file_source(file: YamlFile) -> ConfigSource:
    """The settings of a YAML file."""
    source = ConfigSource("file", file.place, _suggest_in_file, found=list(file.problems))
    for key, value in file.values.items():
        section, dot, inner = str(key).partition(".")
        if dot:
            hint = f"write `{inner}:` indented below `{section}:`"
            source.refuse(f"there is no setting `{key}` at the top", str(key), hint)
        else:
            source.add(section, value)
    return source


def environment_source(environ: Mapping[str, str]) -> ConfigSource:
    """The settings of `FT_SECTION__KEY` variables; an empty variable counts as not set."""
    variables: dict[str, str] = {}
    source = ConfigSource("environment", lambda key: variables.get(key, _variable(key)), _suggest_in_environment)
    for variable in sorted(environ):
        if not variable.startswith("FT_") or variable in RESERVED_VARIABLES or not environ[variable]:
            continue
        key = variable.removeprefix("FT_").lower().replace("__", ".")
        ours = "." in key or key in (*SECTIONS, *KEYS, PROFILE_KEY)
        # FT_SOMETHING may belong to another program; only a near miss of ours is refused.
        if ours or get_close_matches(variable.upper(), list(_single_underscored()), n=1, cutoff=0.85):
            variables[key] = variable
            source.add(key, read_word(key, environ[variable]))
    return source


def flag_source(overrides: Mapping[str, object], profile: str | None) -> ConfigSource:
    """The settings of flags, by dotted key; hyphens in keys mean underscores."""
    source = ConfigSource("flag", lambda key: f"--set {key}", _suggest_dotted)
    for key, value in overrides.items():
        source.add(key.replace("-", "_"), value)
    if profile is not None:
        source.found += _profile_problems(profile, "--profile")
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
    """A value typed in a shell: for a setting that takes free text, `0123` and `a: b` stay as they are typed.

    For one that takes a list of names, `a,b` is one.
    """
    key = "template.name" if key == "template" else key
    if key in KEYS and not accepts_text(key) and (names := _names_in(key, text)):
        return names
    if key not in KEYS or not accepts_text(key) or text.lstrip()[:1] in ("'", '"'):
        return read_scalar(text)
    return None if text.strip() in ("", "null", "Null", "NULL", "~") else text


def _names_in(key: str, text: str) -> list[str]:
    """The names that were typed for a setting that takes a list of them; none where the text is something else."""
    value, choices = read_scalar(text), choices_of(key)
    words = [str(word) for choice in choices for word in choice.get("enum", [choice.get("const")])]
    if not isinstance(value, str) or not any(choice.get("items", {}).get("type") == "string" for choice in choices):
        return []
    return [] if get_close_matches(value, words, n=1) else [name.strip() for name in value.split(",")]


def shown(value: object) -> str:
    """A value as Python writes it, cut at 80 characters; never slow, whatever its size."""
    if value is None:
        return "empty (null)"
    try:
        text = repr(value) if isinstance(value, str) and len(value) < 100 else _BOUNDED.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


_MOST_NAMED = 6
"""How many settings a hint names."""
_BOUNDED = reprlib.Repr()
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = 90
_BOUNDED.maxlevel = 3


def _profile_problems(name: object, where: str) -> list[Problem]:
    """Why this cannot be the profile, if it cannot; None means no profile."""
    if name is None or (isinstance(name, str) and name in PROFILES):
        return []
    near = get_close_matches(name, list(PROFILES), n=1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]}?" if near else "choose one of " + ", ".join(PROFILES)
    return [Problem(f"there is no profile {shown(name)}", where, hint)]


def _value_hint(key: str, value: object) -> str:
    choices = choices_of(key)
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        value = ",".join(value)
    if isinstance(value, str):
        if (key, value.lower()) in VALUES_ELSEWHERE:
            return VALUES_ELSEWHERE[key, value.lower()]
        words = [word for choice in choices for word in choice.get("enum", [choice.get("const")])]
        if near := get_close_matches(value, [word for word in words if isinstance(word, str)], n=1):
            return f"did you mean {near[0]}?"
        items = [word for choice in choices for word in choice.get("items", {}).get("enum", [])]
        nearest = [get_close_matches(part.strip(), items, n=1) for part in value.split(",")]
        if all(nearest):
            return f"write a list: [{', '.join(word for [word] in nearest)}]"
        if value == "None" and any(choice.get("type") == "null" for choice in choices):
            return "write null for no value"
    elif accepts_text(key) and value is not None and not isinstance(value, (list, dict)):
        return "put it in quotes if it is meant as text"
    default = default_of(key)
    shown_default = "null" if default is None else list(default) if isinstance(default, tuple) else default
    return f"leave it out for the default, {shown_default}"


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
        names = list(SECTIONS[section].model_fields)
        more = f", ...: all {len(names)} with `ft init -`" if len(names) > _MOST_NAMED else ""
        return f"`{section}` has: " + ", ".join(names[:_MOST_NAMED]) + more
    return "there are: " + ", ".join([*SECTIONS, *(key for key in KEYS if "." not in key), PROFILE_KEY])


def _variable(key: str) -> str:
    return "FT_" + key.upper().replace(".", "__")


def _single_underscored() -> dict[str, str]:
    ours = [_variable(key) for key in (*KEYS, PROFILE_KEY)]
    return {variable.replace("__", "_"): variable for variable in ours}
