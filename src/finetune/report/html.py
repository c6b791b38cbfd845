"""One page that opens anywhere, tonight and in ten years: no network, no server, nothing beside it."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UsageError
from finetune.report.build import build_report
from finetune.report.charts import Chart, draw_charts, draw_comparison
from finetune.report.numbers import NOT_MEASURED, say_bytes, say_count, say_number, say_percent, say_seconds
from finetune.report.wording import SYMBOLS, headline_figures, say_outcome, say_start, say_title
from finetune.words import visible

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_CHANGES = ("worsened", "improved", "still wrong", "still right", "not compared")
_SHOWN_ANSWERS = 6
_CLASSES = {word: word.replace(" ", "-") for word in SYMBOLS}


def render_html(runs: Sequence[Mapping[str, object]]) -> str:
    """Render one self-contained page from one or more run.json values; several are compared side by side first.

    The same runs give the same bytes. Text from the runs is shown inertly, whatever it holds.
    """
    if not runs:
        raise UsageError("A report needs at least one run, and none was given.", hint="name a run folder")
    reports = [build_report(run) for run in runs]
    names = [_letters(place) for place in range(len(reports))]
    sections = [_section(report, name) for report, name in zip(reports, names, strict=True)]
    return page_template("template.html.j2").render(
        sections=sections,
        title=say_title(reports[0]) if len(reports) == 1 else f"{len(reports)} runs side by side",
        comparison=_comparison(sections, draw_comparison(reports, names)) if len(reports) > 1 else None,
    )


def _section(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One run as the template wants it."""
    answers = {key: _grouped(pairs) for key, pairs in report["answers"].items()}
    counts = [(key, value) for key, value in report["data"]["counts"].items() if value]
    places = {why: place for _, value in counts for why, place in (value.get("dropped_at") or {}).items()}
    return {
        "name": name,
        "report": report,
        "title": say_title(report),
        "start": say_start(report),
        "sentence": say_outcome(report),
        "figures": headline_figures(report),
        "charts": draw_charts(report, f"run-{name.lower()}"),
        "answers": answers,
        "changes": _changes(answers),
        "counts": counts,
        "drops": {why: places.get(why) for why in _named(counts, "dropped")},
        "shapes": _named(counts, "shapes"),
        "sources": _named(counts, "sources"),
    }


def _named(counts: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> list[str]:
    """What any of the sets of rows counts under a key."""
    return sorted({name for _, value in counts for name in value.get(key) or {}})


def _comparison(sections: Sequence[Mapping[str, Any]], chart: Chart) -> dict[str, Any]:
    """Verdicts and headline figures with one column a run."""
    reports = [section["report"] for section in sections]
    verdicts = [
        (group[0]["title"], [item["outcome"] or "not judged" for item in group])
        for group in zip(*(report["criteria"] for report in reports), strict=True)
    ]
    figures = [
        (group[0].label, [figure.value for figure in group])
        for group in zip(*(section["figures"] for section in sections), strict=True)
    ]
    return {"verdicts": verdicts, "figures": figures, "chart": chart}


def _grouped(pairs: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Answers with the telling ones first: what got worse, then what got better, then the rest."""
    ordered = sorted(pairs, key=lambda pair: _CHANGES.index(pair["change"]))
    counts = [(word, sum(pair["change"] == word for pair in pairs)) for word in _CHANGES]
    return {
        "shown": ordered[:_SHOWN_ANSWERS],
        "folded": ordered[_SHOWN_ANSWERS:],
        "counts": dict(counts),
        "control": any(pair["control"] for pair in pairs),
    }


def _changes(answers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[int]]]:
    groups = [group["counts"] for group in answers.values() if group["shown"]]
    rows = [(word, [counts[word] for counts in groups]) for word in _CHANGES]
    # The four ways are worth a row even at zero; answers that met no partner only when there are any.
    return [(word, numbers) for word, numbers in rows if word != "not compared" or any(numbers)]


def _letters(place: int) -> str:
    """A, B, ... Z, AA, AB, ...: short names that no run id can spoil."""
    head, tail = divmod(place, 26)
    return (_letters(head - 1) if head else "") + chr(ord("A") + tail)


def page_template(name: str) -> "Template":
    """One of the templates beside this file; what it prints of values is inert and visible."""
    return _environment().get_template(name)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_say,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=say_count, number=say_number, bytes=say_bytes, percent=say_percent, seconds=say_seconds, plain=_plain
    )
    environment.globals.update(symbols=SYMBOLS, classes=_CLASSES)
    return environment


def _say(value: object) -> Any:
    """The last word on everything the template prints: absent values say so, control characters are visible."""
    if value is None:
        return NOT_MEASURED
    return visible(value) if type(value) is str else value


def _plain(value: object) -> str:
    """A plan value as it would be written in JSON; text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
