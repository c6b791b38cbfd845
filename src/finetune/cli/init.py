"""`ft init`: a configuration to start from, every setting explained."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_data, say
from finetune.errors import OutputError


def command(
    path: Annotated[Path, typer.Argument(help="Where to write it; - prints it.")] = Path("finetune.yaml"),
) -> int:
    """Write a commented configuration file; an existing file is never overwritten."""
    from finetune.config import commented_config
    from finetune.files import write_text

    if str(path) == "-":
        print_data(commented_config())
        return 0
    if path.exists():
        raise OutputError(f"{path} exists already", hint="name another file: ft init other.yaml")
    if not path.parent.is_dir():
        raise OutputError(f"folder {path.parent} does not exist", hint="make it first")
    write_text(path, commented_config())
    say(f"wrote {path}; check it with: ft check {path}")
    return 0
