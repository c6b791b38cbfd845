"""The charts of a report: each is drawn when its data are there, and otherwise says in a sentence why it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.report import ink
from finetune.report.numbers import say_bytes, say_count, say_number, say_percent, say_rate
from finetune.report.wording import loss_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 430, 240
_WIDE = 700
_BELOW = 24
_LABELS = 108
_PARTS = {
    "weight": ("weights", ink.GREY),
    "gradient": ("gradients", ink.RED),
    "optimizer": ("optimizer", ink.OCHRE),
    "rest": ("the rest", ink.BLUE),
}
RUN_COLOURS = (ink.TEAL, ink.BLUE, ink.OCHRE, ink.RED, ink.VIOLET, ink.GREY)
RUN_DASHES = ("-", "--", ":", "-.")
_SCORE_ROWS = (
    ("learning", "base", "before", ink.GREY),
    ("learning", "tuned", "after", ink.TEAL),
    ("learning", "control", "shuffled-label control", ink.OCHRE),
    ("retention", "base", "before", ink.GREY),
    ("retention", "tuned", "after", ink.TEAL),
)
_SCORE_HEADS = {"learning": "Trained questions", "retention": "Other questions"}


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: `svg` to put into the page, or None and the reason in `absent`."""

    name: str
    title: str
    caption: str
    svg: str | None
    absent: str = ""


def draw_charts(report: Mapping[str, object], prefix: str) -> dict[str, Chart]:
    """Draw every chart of one run; `prefix` keeps ids apart from those of other runs on the same page."""
    return {
        "loss": _loss(report, f"{prefix}-loss"),
        "rate": _rate(report, f"{prefix}-rate"),
        "scores": _scores(report, f"{prefix}-scores"),
        "memory": _memory(report, f"{prefix}-memory"),
        "lengths": _lengths(report, f"{prefix}-lengths"),
    }


def draw_comparison(reports: Sequence[Mapping[str, object]], names: Sequence[str]) -> Chart:
    """Draw the training loss of several runs over each other, named by the letters the page gives them."""
    units = " or ".join(sorted({*map(loss_unit, reports)}))
    title, caption = "Training loss of every run", f"{units}, by optimizer step"
    drawn = [(name, _points(report, "train", "loss")) for name, report in zip(names, reports, strict=True)]
    if not any(points for _, points in drawn):
        return Chart("comparison", title, caption, None, "None of these runs recorded a finite training loss.")
    with ink.sheet(_WIDE, _HEIGHT) as figure:
        axes = figure.add_axes(axes_inside(_WIDE, _HEIGHT, top=30))
        for place, (name, points) in enumerate(drawn):
            dashes = RUN_DASHES[place // len(RUN_COLOURS) % len(RUN_DASHES)]
            colour = RUN_COLOURS[place % len(RUN_COLOURS)]
            if points:
                _line(axes, points, f"run {name}", color=colour, linestyle=dashes)
        finish_steps(axes)
        said = "; ".join(f"run {name} from {_ends(points)}" for name, points in drawn if points)
        return Chart("comparison", title, caption, ink.to_svg(figure, prefix="all", title=title, description=said))


def _loss(report: Mapping[str, Any], prefix: str) -> Chart:
    title, caption = "Loss", f"{loss_unit(report)}, by optimizer step"
    series = {name: _points(report, name, "loss") for name in ("train", "fixed", "held_out")}
    if not any(series.values()):
        return Chart("loss", title, caption, None, report["absent"]["train"])
    with ink.sheet(_WIDTH, _HEIGHT) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, _HEIGHT, top=30))
        _line(axes, series["train"], "each step", color=ink.BLUE, linewidth=1.3)
        _line(axes, series["held_out"], "held out", color=ink.OCHRE, marker="s", markersize=4.5)
        # Before and after were measured, what lies between was not: no line joins them.
        _line(axes, series["fixed"], "fixed batches", color=ink.TEAL, linestyle="none", marker="D", markersize=7)
        finish_steps(axes)
        words = {"train": "training loss", "fixed": "loss on fixed batches", "held_out": "held-out loss"}
        said = "; ".join(f"{words[name]} from {_ends(points)}" for name, points in series.items() if points)
        return Chart("loss", title, caption, ink.to_svg(figure, prefix=prefix, title=title, description=said))


def _rate(report: Mapping[str, object], prefix: str) -> Chart:
    title, caption = "Learning rate and gradient norm", "by optimizer step"
    rates, norms = _points(report, "train", "learning_rate"), _points(report, "train", "grad_norm")
    panels = [
        (points, label, colour)
        for points, label, colour in ((rates, "learning rate", ink.TEAL), (norms, "gradient norm", ink.VIOLET))
        if points
    ]
    if not panels:
        why = "run.json holds neither learning rates nor gradient norms."
        return Chart("rate", title, caption, None, why)
    gap = 48
    with ink.sheet(_WIDTH, _HEIGHT) as figure:
        for place, (points, label, colour) in enumerate(panels):
            share = (_HEIGHT - 30 - _BELOW - gap * (len(panels) - 1)) / len(panels)
            axes = figure.add_axes(axes_inside(_WIDTH, _HEIGHT, left=54, top=30 + place * (share + gap), tall=share))
            _line(axes, points, label, color=colour, linewidth=1.5)
            axes.set_ylim(bottom=0)
            finish_steps(axes, ticks=3)
        said = "; ".join(
            f"{label} from {say_rate(points[0][1])} to {say_rate(points[-1][1])}, "
            f"highest {say_rate(max(value for _, value in points))}"
            for points, label, _ in panels
        )
        return Chart("rate", title, caption, ink.to_svg(figure, prefix=prefix, title=title, description=said))


def _scores(report: Mapping[str, Any], prefix: str) -> Chart:
    title, caption = "Right answers", "share of questions, with 95% Wilson intervals"
    rows = [(*row, report["scores"][row[0]][row[1]]) for row in _SCORE_ROWS if report["scores"][row[0]][row[1]]]
    if not rows:
        return Chart("scores", title, caption, None, report["absent"]["learning"])
    places: list[float] = []
    heads: dict[str, float] = {}
    place = 0.0
    for row in rows:
        if row[0] not in heads:
            place += 0.45 if heads else 0
            heads[row[0]] = place
            place += 0.85
        places.append(place)
        place += 1
    height = round(27 * place + 30)
    with ink.sheet(_WIDTH, height) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, height, left=_LABELS, right=104))
        for at, (group, model, _, colour, tally) in zip(places, rows, strict=True):
            bars = axes.barh(at, tally["share"], height=0.62, color=colour)
            bars[0].set_gid(f"{ink.MARK}-{group}-{model}")
            # A rim of paper under the whisker, or it would drown in the bar in one theme or the other.
            for colour, width in ((ink.PAPER, 3.0), (ink.INK, 1.4)):
                axes.plot([tally["low"], tally["high"]], [at, at], color=colour, linewidth=width, solid_capstyle="butt")
            axes.plot([tally["low"], tally["high"]], [at, at], "|", color=ink.INK, markersize=7, clip_on=False)
            value = f"{tally['right']} of {tally['of']} · {say_percent(tally['share'])}"
            _right_label(axes, at, value)
        for group, at in heads.items():
            axes.text(-0.01, at, _SCORE_HEADS[group], va="center", ha="left", fontweight="bold", clip_on=False)
        axes.set_yticks(places, [row[2] for row in rows], color=ink.INK)
        axes.set_ylim(place - 0.4, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
        ink.plain_axes(axes, grid="x")
        said = "; ".join(
            f"{_SCORE_HEADS[group].lower()} {name}: {tally['right']} of {tally['of']} right, "
            f"interval {say_percent(tally['low'])} to {say_percent(tally['high'])}"
            for group, _, name, _, tally in rows
        )
        return Chart("scores", title, caption, ink.to_svg(figure, prefix=prefix, title=title, description=said))


def _memory(report: Mapping[str, Any], prefix: str) -> Chart:
    title, caption = "Peak memory of training", "each measured in a fresh process"
    measures = report["memory"]
    if not measures:
        return Chart("memory", title, caption, None, report["absent"]["memory"])
    names = {"lora": "LoRA", "full": "Full"}
    height = round(98 * len(measures) + 58)
    with ink.sheet(_WIDTH, height) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, height, left=_LABELS, right=68, top=34))
        places: list[float] = []
        labels: list[str] = []
        for row, measure in enumerate(measures):
            at = row * 2.5
            _stacked_bar(axes, measure, at)
            _right_label(axes, at, say_bytes(measure["peak_tensors"]))
            places, labels = [*places, at], [*labels, f"{names[measure['method']]} tensors"]
            if measure["rss_above_framework"] is not None:
                bar = axes.barh(at + 0.95, measure["rss_above_framework"] / 1e6, height=0.5, color="none")
                bar[0].set(edgecolor=ink.INK, linewidth=1.2, gid=f"{ink.MARK}-{measure['method']}-process")
                _right_label(axes, at + 0.95, say_bytes(measure["rss_above_framework"]))
                places, labels = [*places, at + 0.95], [*labels, f"{names[measure['method']]} process"]
        axes.set_yticks(places, labels, color=ink.INK)
        axes.set_ylim(2.5 * len(measures) - 0.95, -0.7)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} MB")
        ink.plain_axes(axes, grid="x")
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(-_LABELS / (_WIDTH - _LABELS - 68), 1.0), **LEGEND)
        said = "; ".join(
            f"{names[measure['method']]}: peak live tensors {say_bytes(measure['peak_tensors'])}, of it "
            + ", ".join(f"{label} {say_bytes(measure['parts'][part])}" for part, (label, _) in _PARTS.items())
            for measure in measures
        )
        return Chart("memory", title, caption, ink.to_svg(figure, prefix=prefix, title=title, description=said))


def _lengths(report: Mapping[str, Any], prefix: str) -> Chart:
    title, caption = "Tokens a row", "training rows, before those over the limit are cut or dropped"
    counts = report["data"]["counts"]["train"] or {}
    lengths = counts.get("lengths")
    if not lengths:
        return Chart("lengths", title, caption, None, report["absent"]["counts"])
    steps = lengths["steps"]
    places = max(len(steps), 6)  # rows of one length are one bar, of the width of any
    height = round(22 * places + 30)
    with ink.sheet(_WIDTH, height) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, height, left=_LABELS, right=68))
        for at, (*_, rows) in enumerate(steps):
            bars = axes.barh(at, rows, height=0.72, color=ink.TEAL)
            bars[0].set_gid(f"{ink.MARK}-lengths-{at}")
            _right_label(axes, at, say_count(rows))
        labels = [f"{say_count(first)} to {say_count(last)}" for first, last, _ in steps]
        axes.set_yticks(range(len(steps)), labels, color=ink.INK)
        axes.set_ylim(places - 0.4, -0.6)
        axes.xaxis.set_major_locator(_few_ticks(whole=True))
        ink.plain_axes(axes, grid="x")
        said = (
            f"{say_count(lengths['shortest'])} to {say_count(lengths['longest'])} tokens, median "
            f"{say_count(lengths['median'])}, 95% of the rows have at most {say_count(lengths['most'])}"
        )
        return Chart(
            "lengths", title, f"{caption}: {said}", ink.to_svg(figure, prefix=prefix, title=title, description=said)
        )


def _stacked_bar(axes: "Axes", measure: Mapping[str, Any], at: float) -> None:
    left = 0.0
    for part, (label, colour) in _PARTS.items():
        width = measure["parts"][part] / 1e6
        # One legend entry a part, however many bars; a thin gap of paper keeps neighbours apart without colour.
        bars = axes.barh(at, width, left=left, height=0.72, color=colour, label=label if at == 0 else "_")
        bars[0].set(edgecolor=ink.PAPER, linewidth=0.8, gid=f"{ink.MARK}-{measure['method']}-{part}")
        left += width


LEGEND: dict[str, Any] = {
    "borderpad": 0,
    "borderaxespad": 0.4,
    "columnspacing": 1.4,
    "handlelength": 1.3,
    "handletextpad": 0.5,
}


def _points(report: Mapping[str, Any], series: str, field: str) -> list[tuple[float, float]]:
    """Step and value where both are there; a point that was not finite is left out and told in the notes."""
    points = ((point["step"], point[field]) for point in report["losses"][series])
    return [(step, value) for step, value in points if step is not None and value is not None]


def _line(axes: "Axes", points: Sequence[tuple[float, float]], label: str, **look: object) -> None:
    if not points:
        return
    # A single point draws no line: without a marker it would be there and invisible.
    look = {"marker": "o", "markersize": 5, **look} if len(points) == 1 else look
    (line,) = axes.plot(*zip(*points, strict=True), label=label, clip_on=False, **look)
    line.set_gid(f"{ink.MARK}-{label.replace(' ', '-')}")


def finish_steps(axes: "Axes", *, ticks: int = 5, columns: int = 6) -> None:
    """Make axes by whole steps: light, few ticks, the legend above them."""
    ink.plain_axes(axes, grid="y")
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(_few_ticks(whole=True))
    axes.yaxis.set_major_locator(_few_ticks(count=ticks))
    axes.yaxis.set_major_formatter(lambda value, _: say_rate(value))
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), **LEGEND)


def _few_ticks(*, whole: bool = False, count: int = 5) -> Any:
    from matplotlib.ticker import MaxNLocator

    # Whole numbers only, even where there is but one to name.
    least = 1 if whole else 2
    return MaxNLocator(count, integer=whole, min_n_ticks=least, steps=[1, 2, 2.5, 5, 10])


def _right_label(axes: "Axes", at: float, text: str) -> None:
    """A value in a column right of the bars, where no bar or whisker can cross it."""
    axes.annotate(
        text, (1, at), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center"
    )


def _ends(points: Sequence[tuple[float, float]]) -> str:
    return f"{say_number(points[0][1])} to {say_number(points[-1][1])} over {len(points)} points"


def axes_inside(
    width: int, height: int, *, left: int = 42, right: int = 10, top: float = 8, tall: float | None = None
) -> tuple[float, float, float, float]:
    """The axes' place in figure shares for margins in CSS pixels: charts beside each other line up."""
    tall = height - top - _BELOW if tall is None else tall
    return left / width, 1 - (top + tall) / height, (width - left - right) / width, tall / height
