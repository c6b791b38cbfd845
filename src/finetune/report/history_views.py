"""The history of the tests for people: the last sessions in a terminal, all of them with their trends as a page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.report.history import HistoryEntry
from finetune.report.html import page_template
from finetune.report.numbers import NOT_MEASURED, say_bytes, say_count, say_number, say_seconds
from finetune.report.trends import draw_trends

if TYPE_CHECKING:
    from rich.console import Console

TIERS = {
    1: "Tier 1: laws, without an ML framework",
    2: "Tier 2: real models, the five criteria",
    3: "Tier 3: the whole chain",
}
HEADS = ("#", "began (UTC)", "commit", "time", "passed", "skipped", "cases", "largest process", "machine")
_LAST = 8


def print_history(entries: Sequence[HistoryEntry], console: "Console") -> None:
    """Print the last sessions of each tier and the scores of the newest, in text of any width."""
    from rich.table import Table
    from rich.text import Text

    for tier, title in TIERS.items():
        of_tier = [entry for entry in entries if entry.tier == tier]
        if not of_tier:
            continue
        console.print(Text(title, style="bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        for head in HEADS:
            table.add_column(head, overflow="fold", no_wrap=head == HEADS[1])
        for row in session_rows(of_tier)[-_LAST:]:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        if len(of_tier) > _LAST:
            console.print(Text(f"{len(of_tier) - _LAST} older ones are not shown here; --html FILE shows all"))
        for name, value in of_tier[-1].scores.items():
            console.print(Text(f"  {name}: {say_number(value)}"))
        console.print()


def session_rows(entries: Sequence[HistoryEntry]) -> list[tuple[str, ...]]:
    """Each session of one tier in words, one for each of `HEADS`."""
    return [
        (
            str(number),
            f"{entry.when:%Y-%m-%d %H:%M}",
            entry.commit or "unknown",
            say_seconds(entry.seconds),
            _say_passed(entry),
            say_count(entry.skipped),
            say_count(entry.cases),
            say_bytes(entry.largest_process_bytes),
            entry.place,
        )
        for number, entry in enumerate(entries, start=1)
    ]


def _say_passed(entry: HistoryEntry) -> str:
    ran = entry.passed + entry.failed + entry.errors
    if entry.pass_rate is None:
        return NOT_MEASURED
    return f"{entry.passed:,} of {ran:,}"


def render_history(entries: Sequence[HistoryEntry], problems: Sequence[str]) -> str:
    """Render one self-contained page with every session and its trends, tier by tier; `problems` are told first."""
    tiers = []
    for tier, title in TIERS.items():
        of_tier = [entry for entry in entries if entry.tier == tier]
        if of_tier:
            charts, rows = draw_trends(of_tier, f"tier-{tier}"), session_rows(of_tier)
            tiers.append({"title": title, "charts": charts, "rows": rows, "number": tier})
    title = "History of the tests"
    return page_template("history.html.j2").render(title=title, tiers=tiers, heads=HEADS, problems=problems)
