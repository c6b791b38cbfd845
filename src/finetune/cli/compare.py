"""`ft compare`: the same questions through every inference path of a run's result."""

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.console import data_console, exit_code, print_json, say
from finetune.cli.options import AsJson, RunPath
from finetune.errors import RefusedError

if TYPE_CHECKING:
    from finetune.compare.comparison import Comparison, PathResult

Through = Annotated[
    str | None, typer.Option("--through", metavar="PATHS", help="Such as merged,mlx,gguf-q8_0. Default: every path.")
]


def command(run: RunPath, *, through: Through = None, json_output: AsJson = False) -> int:
    """Check that merged, GGUF and MLX copies answer like the trained model.

    Trainer, PEFT, merged model, mlx-lm, torch, MLX, reference, llama.cpp with the adapter (--lora), with GGUF of each
    type and as a server: exact matches, the first token that differs, KL.
    A path that --through names and that cannot be compared here ends with 3.
    """
    from finetune.compare.comparison import PATHS, compare_paths
    from finetune.records import Outcome

    names = [name.strip() for name in through.split(",")] if through is not None else PATHS
    found = compare_paths(run, names, tell=say)
    for note in found.notes:
        say(f"note: {note}")
    if json_output:
        print_json(found.as_dict())
    else:
        _print(found)
    code = exit_code(found.outcome)
    skipped = [row for row in found.rows if row.outcome == Outcome.NOT_APPLICABLE and row.path in names]
    if code == 0 and through is not None and skipped:
        told = "; ".join(f"{row.path}: {row.reason}" for row in skipped)
        raise RefusedError(f"asked for and not compared: {told}", hint="install what it needs, or leave it out")
    return code


def _print(found: "Comparison") -> None:
    from rich.table import Table

    sets = list(found.asked)
    table = Table("path", "outcome", *sets, "differ", "first difference", "mean KL", "worst KL", "off by", box=None)
    for row in found.rows:
        table.add_row(
            row.path, row.outcome or "baseline", *(_right(found, row, name) for name in sets), *_drift(found, row)
        )
    data_console().print(table)
    for row in found.rows:
        if row.sees:
            shares = row.sees.values()
            say(f"{row.path}: tells when a single weight is off by {min(shares):.2%} to {max(shares):.2%}")
    counts = " and ".join(f"{count} of {name}" for name, count in found.asked.items())
    say(f"questions: {counts}; distributions at {found.tokens} tokens of the trainer's own answers")


def _right(found: "Comparison", row: "PathResult", name: str) -> str:
    return f"{row.right[name]}/{found.asked[name]}" if name in row.right else ""


def _drift(found: "Comparison", row: "PathResult") -> tuple[str, ...]:
    drift = row.drift
    if drift is None:
        return ("",) * 5
    first = next(iter(drift.mismatches), None)
    shown = ""
    if first is not None:
        own, theirs = (
            "end" if token is None else repr(found.texts.get(token, "")) for token in (first.own, first.theirs)
        )
        shown = f"q{first.question} t{first.token}: {theirs} for {own}, {first.gap:.2g} nats"
    if drift.mean_kl is None or drift.worst_kl is None or drift.distance is None:
        return str(len(drift.mismatches)), shown, "", "", ""
    return str(len(drift.mismatches)), shown, f"{drift.mean_kl:.1e}", f"{drift.worst_kl:.1e}", f"{drift.distance:.1e}"
