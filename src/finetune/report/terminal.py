"""The verdicts in a terminal: readable in 80 columns, in a log file, and without colour."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import counted
from finetune.records import Outcome
from finetune.report.build import build_report
from finetune.report.numbers import NOT_MEASURED
from finetune.report.wording import ASCII_SYMBOLS, SYMBOLS, headline_figures, say_counts, say_outcome, say_title
from finetune.words import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "inconclusive": "yellow"}
IDLE = Outcome.NOT_APPLICABLE


def print_report(runs: Sequence[Mapping[str, object]], console: "Console", *, verbose: bool = False) -> None:
    """Print a run's verdict and what did not pass to a rich console; several runs as one table.

    A run may carry its folder under "folder"; its files are then named with it.

    Args:
        verbose: every verdict, figure, note and file of each run.
    """
    if len(runs) > 1 and not verbose:
        console.print(_runs_table([build_report(run) for run in runs], console))
        return
    for place, run in enumerate(runs):
        if place:
            console.print()
        (_print_all if verbose else _print_short)(build_report(run), console)


def _print_short(report: Mapping[str, Any], console: "Console") -> None:
    """A headline, a line for each criterion, what did not pass with its reason, and what to try."""
    from rich.text import Text

    outcome, symbols = report["outcome"] or "not judged", _symbols(console)
    style = _STYLES.get(outcome, "dim")
    # Text objects, never markup: an answer or a path may hold [brackets].
    console.print(
        Text(visible(f"{symbols[outcome]} {outcome}: {say_title(report)}; {say_counts(report)}"), style=style)
    )
    console.print()
    console.print(_criterion_table(report, console))
    if rest := [each for each in _verdicts(report) if each["outcome"] != Outcome.PASSED]:
        console.print()
        console.print(_rest_table(rest, console))
    console.print()
    for advice in report["advice"]:
        console.print(Text(visible(f"what to try: {advice}")))
    notes = len(report["notes"]) - len(report["advice"])
    told = f"{counted(notes, 'note')}, " if notes else ""
    console.print(Text(f"-v shows {told}every verdict, figure and file", style="dim"))


def _print_all(report: Mapping[str, Any], console: "Console") -> None:
    from rich.text import Text

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


def _symbols(console: "Console") -> Mapping[str, str]:
    return ASCII_SYMBOLS if console.options.ascii_only else SYMBOLS


def _verdicts(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [verdict for item in report["criteria"] for verdict in [*item["literal"], *item["companions"]]]


def _criterion_table(report: Mapping[str, Any], console: "Console") -> "Table":
    """Five lines: the outcome of each criterion, and what was measured of its own question where that counts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    for criterion in report["criteria"]:
        outcome = criterion["outcome"] or "not judged"
        own = next((each for each in criterion["literal"] if each.get("counts", True)), None)
        texts = (_symbols(console)[outcome], criterion["title"], outcome, (own or {}).get("measured") or "")
        styles = (_STYLES.get(outcome, "dim"), "", _STYLES.get(outcome, "dim"), "")
        table.add_row(*(Text(visible(text), style=style) for text, style in zip(texts, styles, strict=True)))
    return table


def _rest_table(verdicts: Sequence[Mapping[str, Any]], console: "Console") -> "Table":
    """A row for each, or for all of which the same is told: title, then what was measured and allowed, and why."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=3, overflow="fold")
    table.add_column(ratio=5, overflow="fold")
    rows: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        word, reason, told = verdict["outcome"], verdict.get("reason"), str(verdict.get("measured") or NOT_MEASURED)
        if verdict.get("allowed") and word != IDLE:
            told += f"; must be {verdict['allowed']}"
        told += f": {reason}" if reason else ""
        rows.setdefault((word, told), []).append(str(verdict.get("title")))
    for (word, told), titles in rows.items():
        cells = (Text(visible(text)) for text in ("; ".join(titles), told))
        mark = Text(_symbols(console)[word], style=_STYLES.get(word, "dim"))
        table.add_row(mark, *cells, style="dim" if word == IDLE else None)
    return table


def _runs_table(reports: Sequence[Mapping[str, Any]], console: "Console") -> "Table":
    """Several runs, one a row: the verdict, and those of the first figures that were measured in any of them."""
    from rich.table import Table
    from rich.text import Text

    heads = ("trained right", "others right", "fixed loss", "held-out loss", "", "memory", "", "time")
    figures = [headline_figures(report) for report in reports]
    kept = [place for place, head in enumerate(heads) if head and any(each[place].measured for each in figures)]
    titles = [say_title(report) for report in reports]
    alike = len(set(titles)) == 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    table.title = Text(visible(titles[0])) if alike else None
    table.add_column("run", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for name in (*([] if alike else ["model and data"]), *(heads[place] for place in kept)):
        table.add_column(name, overflow="fold")
    for report, title, found in zip(reports, titles, figures, strict=True):
        outcome = report["outcome"] or "not judged"
        verdict = Text(f"{_symbols(console)[outcome]} {outcome}", style=_STYLES.get(outcome, "dim"))
        values = [*([] if alike else [title]), *(found[place].value if found[place].measured else "" for place in kept)]
        table.add_row(Text(visible(str(report["id"]))), verdict, *(Text(visible(value)) for value in values))
    return table


def _verdict_table(report: Mapping[str, Any], console: "Console") -> "Table":
    from rich.table import Table
    from rich.text import Text

    symbols = _symbols(console)
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
    return [
        f"{verdict['outcome']}: {verdict.get('title')}: {verdict['reason']}"
        for verdict in _verdicts(report)
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
