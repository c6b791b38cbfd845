"""`ft runs`: the runs below a folder."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import data_console, print_json, say
from finetune.cli.options import AsJson

Home = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the runs.")]


def command(home: Home = Path("runs"), *, json_output: AsJson = False) -> int:
    """List the runs here: id, model, data, verdict and age, the newest first.

    Wherever a command takes a RUN, write its path, its id or how that begins, or `latest`.
    """
    from finetune.errors import OutputError
    from finetune.run.find import age, list_runs

    if home != Path("runs") and not home.is_dir():
        raise OutputError(f"folder {home} does not exist", hint="ft runs lists those below runs/")
    found, now = list_runs(home), datetime.now(UTC)
    if json_output:
        print_json([run.as_dict() for run in found])
        return 0
    if not found:
        say(f"no run below {home}/; `ft train` makes one")
        return 0
    from rich.table import Table
    from rich.text import Text

    from finetune.words import visible

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True)
    for name in ("model", "data", "verdict", "age"):
        table.add_column(name, overflow="fold")
    for run in found:
        verdict = run.outcome
        if run.outcome == "unreadable":
            say(f"{run.folder}: {run.note}")
        elif run.note:
            verdict += f", {run.note}"
        cells = (run.id, Path(run.model).name or run.model, Path(run.data).name, verdict, age(run.started, now))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    data_console().print(table)
    return 0
