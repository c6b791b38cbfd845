"""Configurations as users write them: files, environment variables and flags."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from finetune.config import PROFILES, LoadedConfig, Plan, Profile, flatten, load_config, parse_assignments
from finetune.errors import ConfigError
from finetune_strategies.configs import nested
from finetune_strategies.scratch import empty_folder

SOURCES = ("default", "profile", "file", "environment", "flag")
"""Where a setting may come from, weakest first."""


def word(value: Any) -> str:
    """A value as somebody types it in a shell: one line of YAML."""
    style = '"' if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").rstrip("\n")


def variable(key: str) -> str:
    """The environment variable of a setting."""
    return "FT_" + key.upper().replace(".", "__")


@contextmanager
def yaml_file(text: str | bytes) -> Iterator[Path]:
    """A configuration file with this text."""
    with empty_folder() as folder:
        path = folder / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        yield path


def load_text(text: str | bytes, **other: Any) -> LoadedConfig:
    """Load a file with this text, and whatever else is given."""
    with yaml_file(text) as path:
        return load_config(path, **{"environ": {}, "overrides": {}, "profile": None, **other})


def load_from(given: dict[str, dict[str, Any]]) -> LoadedConfig:
    """Load with the dotted values given per source."""
    profile = Profile("Made by a test.", given.get("profile", {}))
    with patch.dict(PROFILES, {"planted": profile}):
        return load_text(
            yaml.safe_dump(nested(given.get("file", {})), allow_unicode=True),
            environ={variable(key): word(value) for key, value in given.get("environment", {}).items()},
            overrides=parse_assignments(f"{key}={word(value)}" for key, value in given.get("flag", {}).items()),
            profile="planted",
        )


def value_of(loaded: LoadedConfig | Plan, key: str) -> Any:
    """A setting's value, lists as lists."""
    value = flatten(loaded.config)[key]
    return list(value) if isinstance(value, tuple) else value


def refusal(text: str | bytes = "", **other: Any) -> ConfigError:
    """The error that loading this raises; every problem in it says what, where and how to mend it."""
    try:
        load_text(text, **other)
    except ConfigError as error:
        assert error.exit_code == 2
        assert all(problem.what and problem.where and problem.hint for problem in error.problems)
        return error
    raise AssertionError("this should have been refused")
