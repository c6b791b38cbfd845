"""`ft judge`: the verdict on anybody's fine-tune."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import data_console, exit_code, print_json, say
from finetune.cli.options import AsJson
from finetune.errors import UsageError

Tuned = Annotated[Path, typer.Option("--tuned", help="The folder of an adapter (PEFT, mlx-lm) or of a whole model.")]
Train = Annotated[str, typer.Option("--train", help="The rows that it was trained on.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Its base: folder or hub id; by default the one that the adapter names.")
]
HeldOut = Annotated[str | None, typer.Option("--heldout", help="Rows of the same kind that it was not trained on.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting.")]


def command(
    tuned: Tuned,
    train: Train,
    base: Base = None,
    heldout: HeldOut = None,
    assignments: Assignments = None,
    *,
    json_output: AsJson = False,
) -> int:
    """Judge a fine-tune that any trainer made, as a run of `ft train` is judged.

    Exit code 1 when what counts failed, 4 when the verdict is inconclusive. What can be seen only during training (its
    losses, memory, a control) is named and not judged; so is forgetting on exact answers without data.retention.
    """
    from finetune.adapters.peft_files import base_of
    from finetune.config import load_config, parse_assignments
    from finetune.files import is_run, meant_file
    from finetune.judge import judge_tuned
    from finetune.models.travel import is_hashed
    from finetune.run.find import base_beside

    if not tuned.is_dir():
        raise UsageError(f"--tuned {tuned} is no folder", hint=meant_file(tuned, "name an adapter's or a model's"))
    if is_run(tuned):
        hint = f"its verdict: ft report {tuned}; its adapter: {tuned}/adapter"
        raise UsageError(f"--tuned {tuned} is a run", hint=hint)
    named = base or base_beside(tuned) or base_of(tuned)
    if named is None:
        raise UsageError(f"{tuned} names no base model", hint="name it with --base")
    if is_hashed(named):
        raise UsageError(f"{tuned} was trained on the folder {named}, wherever it lies", hint="name it with --base")
    overrides = {"model.path": named, "data.train": train, "data.valid": heldout}
    given = {key: value for key, value in overrides.items() if value is not None}
    loaded = load_config(
        None, environ=os.environ, overrides={**given, **parse_assignments(assignments or [])}, profile=None
    )
    found = judge_tuned(loaded, tuned)
    allow = loaded.config.judge.allow_inconclusive
    if json_output:
        print_json({**found, "verdicts": [asdict(verdict) for verdict in found["verdicts"]]})
        return exit_code(found["outcome"], allow_inconclusive=allow)
    from rich.table import Table

    table = Table("", "measured", "allowed", "reason", box=None)
    idle = [verdict for verdict in found["verdicts"] if verdict.outcome == "not applicable"]
    for verdict in found["verdicts"]:
        if verdict in idle:
            continue
        style = None if verdict.counts else "dim"
        table.add_row(
            f"{verdict.outcome}: {verdict.title}", verdict.measured, verdict.allowed, verdict.reason, style=style
        )
    data_console().print(table)
    for reason in dict.fromkeys(verdict.reason for verdict in idle):
        say(f"not judged, {reason}: {', '.join(each.title for each in idle if each.reason == reason)}")
    for note in found["notes"]:
        say(f"note: {note}")
    data_console().print(f"{found['outcome']} (answers: {found['answers']}, goal: {found['goal']})")
    return exit_code(found["outcome"], allow_inconclusive=allow)
