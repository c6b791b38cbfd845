"""`ft evaluate`: ask base and tuned model the run's questions again."""

from typing import Any

from finetune.cli.console import data_console, print_json
from finetune.cli.options import AsJson, RunPath


def command(run: RunPath, *, json_output: AsJson = False) -> int:
    """Score the base and the fine-tuned model of a finished run on its questions."""
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
