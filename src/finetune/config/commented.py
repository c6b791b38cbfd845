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
_WIDTH = 110


def commented_config() -> str:
    """A configuration file with every setting explained; loading it unchanged gives the defaults."""
    blocks = [_HEAD, _profile_block()]
    section = ""
    for key in KEYS:
        home, _ = split_key(key)
        if home and home != section:
            blocks.append(f"{_comment(description_of(home), '')}\n{home}:\n")
        section = home
        blocks.append(_setting_block(key, "  " if home else ""))
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
        "description": _profile_sentence(),
        "title": "Profile",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "FineTune configuration"}


def _setting_block(key: str, indent: str) -> str:
    default = default_of(key)
    default = list(default) if isinstance(default, tuple) else default
    shown = "null" if default is None else default
    prose = _comment(description_of(key), indent)
    allowed = _comment(f"Allowed: {expectation(key)}. Default: {shown}.", indent)
    return f"{prose}\n{allowed}\n{indent}#{yaml_line(split_key(key)[1], default)}\n"


def _profile_block() -> str:
    lines = [_comment(_profile_sentence(), "")]
    lines += [_comment(f"  {name}: {profile.sentence}", "") for name, profile in PROFILES.items()]
    return "\n".join([*lines, f"#{PROFILE_KEY}: null\n"])


def _profile_sentence() -> str:
    return "A named starting point for the settings below; null for none."


def _comment(text: str, indent: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )
