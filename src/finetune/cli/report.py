"""`ft report`: show what runs measured, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import data_console, print_json, say
from finetune.cli.options import AsJson

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run folders.")]
Page = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page about all of them here.")]


def command(runs: Runs, *, html: Page = None, json_output: AsJson = False) -> int:
    """Show the report of one run, or several runs side by side."""
    from finetune.artifacts.run_folder import RunFolder
    from finetune.artifacts.write import write_text
    from finetune.report import build_report, print_report, render_html

    found = [{**RunFolder.finished(path).read_manifest(), "folder": str(path)} for path in runs]
    if json_output:
        reports = [build_report(run) for run in found]
        print_json(reports[0] if len(reports) == 1 else reports)
    else:
        print_report(found, data_console())
    if html is not None:
        write_text(html, render_html(found))
        say(f"wrote {html}")
    return 0
