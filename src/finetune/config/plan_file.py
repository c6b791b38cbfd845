"""Write a plan as YAML that says where each value came from, and read it back."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml

from finetune.config.keys import KEYS, SECTIONS, flatten, split_key
from finetune.config.load import Origin, load_config
from finetune.config.resolve import Plan
from finetune.config.yaml_file import read_yaml
from finetune.errors import ConfigError, Problem

FORMAT = 2
"""The version of what a run's folder holds: of the settings in `plan.yaml`, and of `run.json`."""
_HEAD = "# The plan of a FineTune run, format "
_ORIGINS: dict[str, Origin] = {word: word for word in get_args(Origin)}
# What YAML counts as a line break, so that its line numbers fit.
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_ORIGIN_COMMENT = re.compile(rf"  # ({'|'.join(_ORIGINS)})$")


def plan_as_list(plan: Plan) -> list[dict[str, Any]]:
    """Every setting as `{"key", "value", "origin"}`, JSON-ready, in the order of the schema."""
    values = flatten(plan.config)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return [{"key": key, "value": values[key], "origin": plan.origins[key]} for key in KEYS]


def dump_plan(plan: Plan) -> str:
    """The plan as YAML, one setting per line with its origin as a comment; `load_plan` is the inverse."""
    lines = [f"{_HEAD}{FORMAT}"]
    section = ""
    for entry in plan_as_list(plan):
        home, name = split_key(entry["key"])
        if home and home != section:
            lines.append(f"{home}:")
        section = home
        lines.append(f"{'  ' if home else ''}{yaml_line(name, entry['value'])}  # {entry['origin']}")
    return "\n".join(lines) + "\n"


def load_plan(path: Path) -> Plan:
    """Read what `dump_plan` wrote; a value whose origin comment is gone counts as coming from the file.

    Raises ConfigError, like `load_config`.
    """
    file = read_yaml(path)
    lines = _LINE_BREAK.split(file.text)
    # A plan that a person's tool has written again may have lost its comments; its names are judged like any file's.
    number = lines[0].removeprefix(_HEAD)
    if number != lines[0] and number != str(FORMAT):
        what = f"this run is of format {number}, and this version of FineTune goes on with format {FORMAT} only"
        hint = "use the version that made it, or train anew: ft train config.yaml"
        raise ConfigError([Problem(what, str(path), hint)])
    loaded = load_config(file, environ={}, overrides={}, profile=None)
    origins: dict[str, Origin] = dict(loaded.origins)
    for key, line in file.lines.items():
        comment = _ORIGIN_COMMENT.search(lines[line - 1])
        if comment and key in origins and key not in SECTIONS:
            origins[key] = _ORIGINS[comment.group(1)]
    return Plan(loaded.config, origins)


def yaml_line(name: str, value: object) -> str:
    """`name: value` on one line, read back as the same value by any YAML 1.1 reader, floats exactly."""
    if value is None or isinstance(value, bool | int):  # most settings; a dumper for each takes half of a short run
        return f"{name}: {json.dumps(value)}"
    flow = None if isinstance(value, list | dict) else False
    # Sorted, the patterns of a mapping would mean something else: the first that fits counts.
    text: str = yaml.dump(
        {name: value}, Dumper=_DUMPER, default_flow_style=flow, allow_unicode=True, width=2**31 - 1, sort_keys=False
    )
    return text.rstrip("\n")
