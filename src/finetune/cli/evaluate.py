"""`ft evaluate`: ask base and tuned model the run's questions again, or measure them on a file of rows."""

from typing import Annotated, Any

import typer

from finetune.cli.console import data_console, print_json, say
from finetune.cli.options import AsJson, RunPath
from finetune.errors import UsageError

Rows = Annotated[
    str | None, typer.Option("--data", help="Rows that it was not trained on, in any shape of training rows.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="So many rows of --data at most (512).")]


def command(run: RunPath, data: Rows = None, limit: Limit = None, *, json_output: AsJson = False) -> int:
    """Score the base and the fine-tuned model of a finished run on its questions, or on the rows of a file.

    Rows of a file that stand in the training rows, word for word or nearly, are left out, and told; what is measured is
    kept below evaluations/ in the run.
    """
    if data is not None:
        return _on_file(run, data, limit, json_output=json_output)
    if limit is not None:
        raise UsageError("--limit says how many rows of a file are asked", hint="name the file with --data")
    from finetune.evidence.reopen import compare, reopen

    base, tuned = compare(*reopen(run))
    sets = {"trained questions": (base.learning, tuned.learning), "retention": (base.retention, tuned.retention)}
    result: dict[str, Any] = {
        name: {"count": len(old.answers), "base": old.right, "tuned": new.right}
        for name, (old, new) in sets.items()
        if old is not None and new is not None
    }
    result["loss"] = {"base": base.fixed[0], "tuned": tuned.fixed[0], "tokens": tuned.fixed[1]}
    if base.held_out and tuned.held_out:
        result["held-out loss"] = {"base": base.held_out[0], "tuned": tuned.held_out[0], "tokens": tuned.held_out[1]}
    if json_output:
        print_json(result)
        return 0
    from rich.table import Table

    table = Table("measure", "base", "tuned", "of", box=None)
    for name, row in result.items():
        form = "{:.4f}" if "loss" in name else "{}"
        of = row.get("count", row.get("tokens"))
        table.add_row(name, form.format(row["base"]), form.format(row["tuned"]), str(of))
    data_console().print(table)
    return 0


def _on_file(run: Any, data: str, limit: int | None, *, json_output: bool) -> int:
    from finetune.evidence.evaluate import MOST_ROWS, evaluate

    found = evaluate(run, data, limit=limit or MOST_ROWS, tell=say)
    if json_output:
        print_json(found)
        return 0
    from rich.table import Table

    table = Table("measure", "base", "tuned", "difference", "of", "outcome", box=None)
    for row in found["measures"]:
        share = row["id"] != "loss"
        base, tuned, difference = (
            _shown(row.get(name), row.get(f"{name}_interval"), share=share) for name in ("base", "tuned", "difference")
        )
        table.add_row(row["title"], base, tuned, difference, str(row["count"]), row.get("outcome", ""))
    data_console().print(table)
    for row in found["measures"]:
        say(f"{row['title']}: {row['of']}")
    for note in found["notes"]:
        say(f"note: {note}")
    say(f"written: {found['written']}")
    return 0


def _shown(value: float | None, interval: tuple[float, float] | None, *, share: bool) -> str:
    """A share in per cent, or a loss in nats, with its 95% interval."""
    if value is None:
        return ""
    form = "{:.0%}" if share else "{:.4f}"
    return form.format(value) + (f" [{', '.join(form.format(each) for each in interval)}]" if interval else "")
