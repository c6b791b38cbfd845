"""`ft push`: what a run trained, on the hub."""

from typing import Annotated

import typer

from finetune.cli.console import print_data, print_json, say
from finetune.cli.options import AsJson, RunPath

Repo = Annotated[str, typer.Argument(metavar="REPO", help="The repository on the hub: USER/NAME.")]
Merged = Annotated[bool, typer.Option("--merged", help="The model folder that ft merge made, not the adapter.")]
Gguf = Annotated[bool, typer.Option("--gguf", help="The GGUF files that ft export made, each read back first.")]
Private = Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")]
Force = Annotated[bool, typer.Option("--force", help="Also a run that failed its verdict.")]
CheckOnly = Annotated[bool, typer.Option("--check-only", help="Show what would go up, and send nothing.")]


def command(
    run: RunPath,
    repo: Repo,
    *,
    merged: Merged = False,
    gguf: Gguf = False,
    private: Private = False,
    force: Force = False,
    check_only: CheckOnly = False,
    json_output: AsJson = False,
) -> int:
    """Send a run's adapter, model or GGUF files to the Hugging Face hub, with its measured model card.

    What the hub then has is held to what was sent. A run that failed its verdict is refused. The token is that of
    `hf auth login` or HF_TOKEN.
    """
    from finetune.export.push import plan_push, push

    plan = plan_push(run, repo, merged=merged, gguf=gguf, force=force)
    for note in plan.notes:
        say(f"note: {note}")
    done = plan if check_only else push(plan, private=private, tell=say)
    if json_output:
        print_json(done.as_dict())
    elif check_only:
        width = max(len(file.name) for file in plan.files)
        print_data("\n".join(f"{file.name:{width}}  {file.size:>13,} bytes" for file in plan.files))
        say(f"nothing was sent; without --check-only these go to {repo}")
    else:
        print_data(done.url)
    return 0
