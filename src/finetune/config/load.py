"""Load a configuration: defaults < profile < file < environment < flags, every problem reported at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.keys import KEYS, PROFILE_KEY, flatten, unflatten
from finetune.config.profiles import PROFILES
from finetune.config.schema import TrainingConfig
from finetune.config.sources import Origin, environment_source, file_source, flag_source
from finetune.config.yaml_file import read_yaml
from finetune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration and, by dotted key, where each of its values came from."""

    config: TrainingConfig
    origins: Mapping[str, Origin]


def load_config(
    path: Path | None, *, environ: Mapping[str, str], overrides: Mapping[str, Any], profile: str | None
) -> LoadedConfig:
    """Load a YAML file, `FT_SECTION__KEY` variables and flags (`overrides`, by dotted key) into one configuration.

    Raises ConfigError with every problem of every source, each with its place and a hint.
    """
    # Weakest first; values that a stronger source hides are judged all the same.
    sources = [environment_source(environ), flag_source(overrides, profile)]
    if path is not None:
        sources.insert(0, file_source(read_yaml(path)))
    problems = [problem for source in sources for problem in source.problems]
    if problems:
        raise ConfigError(problems)
    named: str | None = None
    for source in sources:
        named = source.values.pop(PROFILE_KEY, named)
    layers: list[tuple[Origin, Mapping[str, Any]]] = [
        ("profile", PROFILES[named].values if named is not None else {}),
        *((source.origin, source.values) for source in sources),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(KEYS, "default")
    for origin, layer in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    return LoadedConfig(unflatten({**flatten(TrainingConfig()), **values}), origins)
