"""`ft report`: show what runs measured, side by side; or what the tests did over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import data_console, print_json, say
from finetune.cli.options import AsJson, Verbose
from finetune.errors import DataError, UsageError

Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RUN", help="Runs: path, id, how one begins or latest."),
]
Page = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page about all of them here.")]
History = Annotated[
    bool,
    typer.Option("--history", help="Show the tests' sessions over time; of .finetune/history.jsonl, or the files."),
]


def command(
    runs: Runs = None,
    *,
    history: History = False,
    html: Page = None,
    verbose: Verbose = False,
    json_output: AsJson = False,
) -> int:
    """Show the report of one run, or several runs side by side; or the history of the tests.

    --json prints a list with one report a run, also for one.
    """
    if history:
        return _show_history(runs or [], html=html, json_output=json_output)
    if not runs:
        raise UsageError(
            "ft report needs a run folder, and none was given", hint="ft report runs/*/, or ft report --history"
        )

    from finetune.files import write_output
    from finetune.report import build_report, print_report, render_html
    from finetune.run.find import find_run
    from finetune.run.folder import RunFolder

    places = [find_run(run) for run in runs]
    found = [{**RunFolder.finished(place).read_manifest(), "folder": str(place)} for place in places]
    if json_output:
        print_json([build_report(run) for run in found])
    else:
        print_report(found, data_console(), verbose=verbose)
    if html is not None:
        write_output(html, render_html(found))
        say(f"wrote {html}")
    return 0


def _show_history(files: Sequence[Path], *, html: Path | None, json_output: bool) -> int:
    from finetune.files import write_output
    from finetune.report.history import HISTORY, WRITTEN_BY, print_history, read_history, render_history

    files = files or [Path(HISTORY)]
    entries, problems = read_history(*files)
    for problem in problems:
        say(f"left out: {problem}")
    if not entries:
        raise DataError(f"no recorded session in {', '.join(map(str, files))}", hint=WRITTEN_BY)
    if json_output:
        print_json({"entries": [entry.model_dump(mode="json") for entry in entries], "problems": problems})
    else:
        print_history(entries, data_console())
    if html is not None:
        write_output(html, render_history(entries, problems))
        say(f"wrote {html}")
    return 0
