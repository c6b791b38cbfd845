"""The verdicts in a terminal: readable in 80 columns, in a log file, and without colour."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.records import Outcome
from finetune.report.build import build_report
from finetune.report.numbers import NOT_MEASURED, visible
from finetune.report.wording import ASCII_SYMBOLS, SYMBOLS, headline_figures, say_outcome, say_title

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "inconclusive": "yellow"}


def print_report(runs: Sequence[Mapping[str, object]], console: "Console") -> None:
    """Print each run's verdicts, headline figures and files to a rich console.

    A run may carry its folder under "folder"; its files are then named with it.
    """
    from rich.text import Text

    for place, run in enumerate(runs):
        report = build_report(run)
        if place:
            console.print()
        # Text objects, never markup: an answer or a path may hold [brackets].
        console.print(Text(visible(say_title(report)), style="bold"))
        console.print(Text(visible(f"run {report['id']}, {report['status']}. {say_outcome(report)}")))
        console.print()
        console.print(_verdict_table(report, console))
        for reason in _reasons(report):
            console.print(Text(visible(reason)))
        console.print()
        console.print(_figure_table(report))
        console.print()
        for note in report["notes"]:
            console.print(Text(visible(f"note: {note}")))
        _print_files(report, console)


def _verdict_table(report: Mapping[str, Any], console: "Console") -> "Table":
    from rich.table import Table
    from rich.text import Text

    symbols = ASCII_SYMBOLS if console.options.ascii_only else SYMBOLS
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("criterion", ratio=4, overflow="fold")
    table.add_column("measured", ratio=4, overflow="fold")
    table.add_column("allowed", ratio=3, overflow="fold")
    for criterion in report["criteria"]:
        outcome = criterion["outcome"] or "not judged"
        style = _STYLES.get(outcome, "dim")
        table.add_row(*(Text(cell, style=style) for cell in (symbols[outcome], criterion["title"], outcome)))
        for verdict in [*criterion["literal"], *criterion["companions"]]:
            word = verdict["outcome"]
            cells = [f"  {verdict.get('title') or criterion['title']}", verdict.get("measured"), verdict.get("allowed")]
            texts = [Text(visible(str(cell or NOT_MEASURED))) for cell in cells]
            table.add_row(Text(f" {symbols[word]}", style=_STYLES.get(word, "dim")), *texts)
    return table


def _reasons(report: Mapping[str, Any]) -> list[str]:
    """The reason of each verdict that did not pass."""
    verdicts = [verdict for item in report["criteria"] for verdict in [*item["literal"], *item["companions"]]]
    return [
        f"{verdict['outcome']}: {verdict.get('title')}: {verdict['reason']}"
        for verdict in verdicts
        if verdict["outcome"] != Outcome.PASSED and verdict.get("reason")
    ]


def _figure_table(report: Mapping[str, object]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    for figure in headline_figures(report):
        table.add_row(
            Text(figure.label, style="dim"), Text(visible(figure.value)), Text(visible(figure.detail), style="dim")
        )
    return table


def _print_files(report: Mapping[str, Any], console: "Console") -> None:
    from rich.text import Text

    folder = f"{report['folder']}/" if report["folder"] else ""
    paths = [f"{folder}{file.get('path')}" for file in report["repeat"]["artifacts"]]
    if not paths:
        paths = [folder or "run.json names no artifact"]
    for place, path in enumerate(paths):
        console.print(Text(visible(f"{'files' if not place else '     '}  {path}")), soft_wrap=True)
