"""The configuration explained: a commented file for `ft init` and a JSON Schema for `ft schema`."""

import textwrap
from typing import Any

from finetune.config.keys import KEYS, PROFILE_KEY, SECTIONS, default_of, description_of, expectation, split_key
from finetune.config.plan_file import yaml_line
from finetune.config.profiles import PROFILES
from finetune.config.schema import TrainingConfig

_HEAD = """\
# A FineTune configuration. Each setting is shown with its default, switched off by a leading #.
# Delete that # to set it; everything else is left to the profile or to the default.
"""
_PROFILE = "A named starting point for the settings below; null for none."


def commented_config() -> str:
    """A configuration file with every setting explained; loading it unchanged gives the defaults."""
    profiles = [_comment(f"  {name}: {profile.sentence}") for name, profile in PROFILES.items()]
    blocks = [_HEAD, "\n".join([_comment(_PROFILE), *profiles, f"#{PROFILE_KEY}: null\n"])]
    section = ""
    for key in KEYS:
        home, name = split_key(key)
        if home and home != section:
            blocks.append(f"{_comment(description_of(home))}\n{home}:\n")
        section, indent = home, "  " if home else ""
        default = default_of(key)
        default = list(default) if isinstance(default, tuple) else default
        allowed = f"Allowed: {expectation(key)}. Default: {'null' if default is None else default}."
        prose = f"{_comment(description_of(key), indent)}\n{_comment(allowed, indent)}"
        blocks.append(f"{prose}\n{indent}#{yaml_line(name, default)}\n")
    return "\n".join(blocks)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, for editors; descriptions included.

    Editors read YAML 1.2, so numbers are numbers here; the loader accepts numbers written as text as well.
    """
    schema = TrainingConfig.model_json_schema()
    properties: dict[str, Any] = schema["properties"]
    for section in SECTIONS:
        choices: list[dict[str, Any]] = [{"$ref": properties[section].pop("$ref")}, {"type": "null"}]
        if section == "template":
            choices += schema["$defs"]["TemplateSpec"]["properties"]["name"]["anyOf"]
        properties[section] = {"anyOf": choices, "description": description_of(section)}
    for group in schema["$defs"].values():
        for part in group["properties"].values():
            part["description"] = " ".join(part["description"].split())
    properties[PROFILE_KEY] = {
        "anyOf": [{"enum": list(PROFILES), "type": "string"}, {"type": "null"}],
        "default": None,
        "description": _PROFILE,
        "title": "Profile",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "FineTune configuration"}


def _comment(text: str, indent: str = "") -> str:
    start = f"{indent}# "
    return textwrap.fill(text, 110, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
