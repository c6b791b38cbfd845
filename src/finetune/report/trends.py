"""The charts of a history: each measure by session, with a gap where nothing was measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.report import ink
from finetune.report.charts import RUN_COLOURS, RUN_DASHES, Chart, axes_inside, finish_steps
from finetune.report.history import HistoryEntry
from finetune.report.numbers import say_bytes, say_count, say_number, say_rate, say_seconds

Series = Mapping[str, Sequence[tuple[int, float | None]]]
"""Under each label the session's number and what it measured, None for nothing."""
_WIDTH, _TALL, _LEFT, _LEGEND_ROW = 430, 170, 62, 19
_SECONDS = " seconds"


@dataclass(frozen=True, slots=True)
class ChartStyle:
    """How a chart is called, and how its values are said: in a sentence, and beside the axis."""

    name: str
    title: str
    say: Callable[[float], str]
    tick: Callable[[float], str]
    share: bool = False


def _tick_seconds(value: float) -> str:
    return f"{value:,g} s"


def _say_rate_of_passing(value: float) -> str:
    """In per cent, exact enough that one failure among thousands does not vanish."""
    return f"{value * 100:.4g} %"


MEASURES: tuple[tuple[ChartStyle, Callable[[HistoryEntry], float | None]], ...] = (
    (ChartStyle("seconds", "Time", say_seconds, _tick_seconds), lambda entry: entry.seconds),
    (
        ChartStyle("pass-rate", "Pass rate", _say_rate_of_passing, _say_rate_of_passing, share=True),
        lambda entry: entry.pass_rate,
    ),
    (ChartStyle("cases", "Generated cases", say_count, say_count), lambda entry: entry.cases),
    (ChartStyle("memory", "Largest process", say_bytes, say_bytes), lambda entry: entry.largest_process_bytes),
)


def draw_trends(entries: Sequence[HistoryEntry], prefix: str) -> list[Chart]:
    """Draw every measure and every score of one tier's sessions, in the order given; `prefix` keeps ids apart.

    Sessions of different machines, Pythons or profiles are never joined by a line.
    """
    places = list(dict.fromkeys(entry.place for entry in entries))
    charts = [_draw(look, {place: _points(entries, place, of) for place in places}, prefix) for look, of in MEASURES]
    for number, (title, names) in enumerate(score_groups(entries).items()):
        say, tick = (say_seconds, _tick_seconds) if title.endswith(_SECONDS) else (say_number, say_rate)
        for at, place in enumerate(places):
            series = {label: _points(entries, place, _score(name)) for label, name in names.items()}
            shown = title if len(places) == 1 else f"{title}, {place}"
            if len(places) == 1 or _measured(series):
                charts.append(_draw(ChartStyle(f"score-{number}-{at}", shown, say, tick), series, prefix))
    return charts


def score_groups(entries: Sequence[HistoryEntry]) -> dict[str, dict[str, str]]:
    """The scores that belong in one chart, by its title and their labels: those of one first word, seconds apart."""
    groups: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry.scores):
        first, _, rest = name.removesuffix(_SECONDS).partition(" ")
        title = f"{first}{_SECONDS}" if name.endswith(_SECONDS) else first
        groups.setdefault(title, {})[rest or first] = name
    return groups


def _score(name: str) -> Callable[[HistoryEntry], float | None]:
    return lambda entry: entry.scores.get(name)


def _points(
    entries: Sequence[HistoryEntry], place: str, of: Callable[[HistoryEntry], float | None]
) -> list[tuple[int, float | None]]:
    """The sessions of that place by their number among all; those of other places leave no gap in its line."""
    return [(number, of(entry)) for number, entry in enumerate(entries, start=1) if entry.place == place]


def _measured(series: Series) -> dict[str, list[float]]:
    """Under each label what was measured, where anything was."""
    found = {label: [value for _, value in points if value is not None] for label, points in series.items()}
    return {label: values for label, values in found.items() if values}


def _draw(look: ChartStyle, series: Series, prefix: str) -> Chart:
    caption = "by session"
    measured = _measured(series)
    if not measured:
        return Chart(look.name, look.title, caption, None, "No session of this tier measured it.")
    letters = max(map(len, measured))
    columns = max(1, min(len(measured), (_WIDTH - _LEFT) // (7 * letters + 34)))
    top = 12 + _LEGEND_ROW * math.ceil(len(measured) / columns)
    with ink.sheet(_WIDTH, top + _TALL) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, top + _TALL, left=_LEFT, top=top))
        for place, label in enumerate(measured):
            numbers, values = zip(*series[label], strict=True)
            (line,) = axes.plot(
                numbers,
                [math.nan if value is None else value for value in values],
                label=label,
                color=RUN_COLOURS[place % len(RUN_COLOURS)],
                linestyle=RUN_DASHES[place // len(RUN_COLOURS) % len(RUN_DASHES)],
                # A session between two that measured nothing is a point, and no line shows a point.
                marker="o",
                markersize=4.5,
                clip_on=False,
            )
            line.set_gid(f"{ink.MARK}-{place}")
        finish_steps(axes, columns=columns)
        axes.set_xlim(0.5, max(number for points in series.values() for number, _ in points) + 0.5)
        lowest = min(min(values) for values in measured.values())
        axes.set_ylim(*((min(0.99, lowest), 1) if look.share else (min(0, lowest), None)))
        axes.yaxis.set_major_formatter(lambda value, _: look.tick(value))
        said = "; ".join(_say_series(label, values, look) for label, values in measured.items())
        prefix = f"{prefix}-{look.name}"
        return Chart(
            look.name, look.title, caption, ink.to_svg(figure, prefix=prefix, title=look.title, description=said)
        )


def _say_series(label: str, values: Sequence[float], look: ChartStyle) -> str:
    count = "1 session" if len(values) == 1 else f"{len(values)} sessions"
    span = f"between {look.say(min(values))} and {look.say(max(values))}"
    return f"{label}: {look.say(values[-1])} at last, {span} over {count}"
