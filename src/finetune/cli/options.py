"""The options that several verbs share, and the configuration they add up to."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.config import LoadedConfig
    from finetune.export.outtypes import Outtype

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; `ft init` writes one.")]
ConfigFiles = Annotated[list[Path] | None, typer.Argument(metavar="[CONFIG]", help="YAML files; `ft init` writes one.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Shipped name, local folder or hub id.")]
DataFile = Annotated[str | None, typer.Option("--data", help="Training rows: .jsonl, .json, .csv, .tsv or .parquet.")]
TemplateName = Annotated[
    str | None, typer.Option("--template", help="auto, tokenizer, alpaca, chatml, llama2, llama3 or a .jinja file.")
]
BackendName = Annotated[str | None, typer.Option("--backend", help="torch, mlx or reference.")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="chat, instruction, code or demo.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as training.seed=1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/20261122-101500-ab12.")]


def gather(
    config: Path | None, flags: dict[str, str | None], assignments: list[str] | None, profile: str | None
) -> "LoadedConfig":
    """The configuration that file, environment and flags add up to.

    Without data of one's own the shipped data is trained on, and then the `demo` profile fits unless another is asked.
    """
    from finetune.config import load_config, parse_assignments

    overrides: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    overrides |= parse_assignments(assignments or [])
    loaded = load_config(config, environ=os.environ, overrides=overrides, profile=profile)
    if loaded.config.data.train is None and "profile" not in loaded.origins.values():
        loaded = load_config(config, environ=os.environ, overrides=overrides, profile="demo")
    return loaded


def flags_of(
    model: str | None, data: str | None, template: str | None, backend: str | None = None
) -> dict[str, str | None]:
    """The short options as settings by dotted key."""
    return {"model.path": model, "data.train": data, "template.name": template, "backend": backend}


def named_outtype(name: str, option: str = "--outtype") -> "Outtype":
    """A type of GGUF files by its name.

    Raises:
        UsageError: there is none of that name.
    """
    from finetune.export.outtypes import OUTTYPES

    for known in OUTTYPES:
        if known == name:
            return known
    quantised = name.lower().startswith(("q", "iq"))
    raise UsageError(
        f"{option} {name!r} is not in this version; choose from: {', '.join(OUTTYPES)}",
        hint="llama.cpp's own llama-quantize makes it from the f16 file" if quantised else "",
    )
