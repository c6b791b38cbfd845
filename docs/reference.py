"""Writes the reference pages from the program itself, so that they cannot say anything else: `make docs`."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from suite_pages import findings_page, kill_matrix_page, laws_page

from finetune.cli.app import app
from finetune.config import KEYS, commented_config, default_of, derive, description_of, json_schema
from finetune.config.profiles import PROFILES

FOLDER = Path(__file__).resolve().parent
WIDTH = 100


def commands_page() -> str:
    """What `ft --help` and `ft VERB --help` print, verb by verb."""
    group: Any = typer.main.get_command(app)
    about = "What each command does, takes and exits with: what `ft COMMAND --help` prints."
    lines = ["# Commands", "", about, "", "```text", _help(group, "ft", None), "```"]
    for name, command in group.commands.items():
        parent = group.context_class(group, info_name="ft", **group.context_settings)
        lines += ["", f"## ft {name}", "", "```text", _help(command, name, parent), "```"]
    return "\n".join(lines) + "\n"


def _help(command: Any, name: str, parent: Any) -> str:
    context = command.context_class(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )
    text: str = command.get_help(context)
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def settings_page() -> str:
    """Every setting with what it accepts, its default and its sentence; then the profiles."""
    schema = json_schema()
    lines = [
        "# Settings",
        "",
        "A configuration is a YAML file of these sections; `--set training.seed=1` and `FT_TRAINING__SEED=1` set any "
        "of them as well. `ft init` writes a commented file with all of them, and `ft check` tells what a run will "
        "use, and why.",
    ]
    section = ""
    for key in KEYS:
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            about = str(_schema_of(schema, section).get("description", "")).splitlines()[:1] if "." in key else []
            lines += ["", f"## {section}", "", *about]
        accepts = " or ".join(dict.fromkeys(_accepted(_schema_of(schema, key), schema)))
        default = json.dumps(default_of(key))
        lines += ["", f"### `{key}` {{ #{key} }}", "", description_of(key), ""]
        lines.append(f"**Accepts** {accepts}; **default** `{default}`")
    lines += ["", "## Profiles", "", "| profile | for | sets |", "|---|---|---|"]
    for name, profile in PROFILES.items():
        values = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in profile.values.items())
        lines.append(f"| `{name}` | {profile.sentence} | {values} |")
    return "\n".join([*lines, *_derived()]) + "\n"


def _derived() -> Iterator[str]:
    """How fast and how long is trained where nothing is set, from the rule itself."""
    yield from ("", "## Learning rate and epochs where none is set", "", *str(derive.__doc__).rstrip().splitlines()[2:])
    yield from ("", "| parameters | LoRA, DoRA | IA3 | full model |", "|---|---|---|---|")
    for size in (2e6, 135e6, 1e9, 8e9, 70e9):
        rates = (derive.derived_learning_rate(int(size), kind) for kind in ("lora", "ia3", "full"))
        yield f"| {size / 1e6:,.0f} M | " + " | ".join(f"{rate:g}" for rate in rates) + " |"
    yield from ("", "| rows, eight a step | epochs | steps |", "|---|---|---|")
    for rows in (20, 64, 200, 2_000, 10_000, 100_000):
        epochs = derive.derived_epochs(rows, math.ceil(rows / 8))
        yield f"| {rows:,} | {epochs:g} | {epochs * math.ceil(rows / 8):,.0f} |"


def _schema_of(schema: dict[str, Any], key: str) -> dict[str, Any]:
    found = schema
    for part in key.split("."):
        found = _resolved(found, schema)["properties"][part]
    return found


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The part that a reference points to; of alternatives, the one with settings in it."""
    if "$ref" in part:
        return _resolved(schema["$defs"][part["$ref"].rsplit("/", 1)[-1]], schema)
    for choice in part.get("anyOf", []):
        if "properties" in (found := _resolved(choice, schema)):
            return found
    return part


def _accepted(part: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """What a setting may be, in a reader's words."""
    if "$ref" in part:
        yield from _accepted(_resolved(part, schema), schema)
    elif "anyOf" in part:
        for choice in part["anyOf"]:
            yield from _accepted(choice, schema)
    elif "enum" in part or "const" in part:
        yield from (f"`{json.dumps(value)}`" for value in part.get("enum", [part.get("const")]))
    elif part.get("type") == "array":
        yield "a list of " + " or ".join(_accepted(part["items"], schema)) + "s"
    else:
        yield _bounded(part)


def _bounded(part: dict[str, Any]) -> str:
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    kind = words.get(part.get("type", ""), str(part.get("type")))
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[name]:,}" for name, sign in signs.items() if name in part]
    if str(part.get("pattern", "")).endswith(r"\.jinja$"):
        kind = "path of a .jinja file"
    return f"{kind} {' and '.join(limits)}".rstrip()


def schema_page() -> str:
    """The JSON Schema of the configuration."""
    return json.dumps(json_schema(), indent=1) + "\n"


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "finetune.yaml": commented_config,
    "schema.json": schema_page,
    "laws.md": laws_page,
    "findings.md": findings_page,
    "kill-matrix.md": kill_matrix_page,
}


def written(name: str) -> str:
    """A page as it lies in docs/: who searches finds what users need before what the suite says of itself."""
    boost = {"settings.md": 2, "commands.md": 2, "laws.md": 0.5, "findings.md": 0.5, "kill-matrix.md": 0.5}.get(name)
    return (f"---\nsearch:\n  boost: {boost}\n---\n\n" if boost else "") + PAGES[name]()


def main() -> None:
    """Write every page, and say which."""
    for name in PAGES:
        (FOLDER / name).write_text(written(name), encoding="utf-8")
        sys.stderr.write(f"written: docs/{name}\n")


if __name__ == "__main__":
    main()
