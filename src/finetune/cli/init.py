"""`ft init`: a configuration to start from."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_data, say
from finetune.errors import OutputError, UsageError

Where = Annotated[Path, typer.Argument(help="Where to write it; - prints it.")]
Minimal = Annotated[bool, typer.Option("--minimal", help="Only what most runs set.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="For a model by family and size, such as qwen3-4b or llama3.1-8b."),
]
ProfileName = Annotated[str | None, typer.Option("--profile", help="Start from chat, instruction, code or demo.")]


def command(
    path: Where = Path("finetune.yaml"),
    *,
    minimal: Minimal = False,
    recipe: RecipeName = None,
    profile: ProfileName = None,
) -> int:
    """Write a commented configuration file; an existing file is never overwritten."""
    from finetune.config import PROFILES, commented_config
    from finetune.config.recipes import RECIPES, minimal_config
    from finetune.files import write_text

    for option, name, known in (("--recipe", recipe, RECIPES), ("--profile", profile, PROFILES)):
        if name is not None and name not in known:
            near = get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UsageError(f"{option} {name!r} does not exist", hint=hint)
    text = minimal_config(recipe, profile=profile) if minimal or recipe or profile else commented_config()
    if str(path) == "-":
        print_data(text)
        return 0
    if path.exists():
        raise OutputError(f"{path} exists already", hint="name another file: ft init other.yaml")
    if not path.parent.is_dir():
        raise OutputError(f"folder {path.parent} does not exist", hint="make it first")
    write_text(path, text)
    say(f"wrote {path}; check it with: ft check {path}")
    return 0
