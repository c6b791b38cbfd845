"""Drawings that follow the page's theme: SVG in CSS variables instead of colours, the same bytes each time."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS variables, so each is drawn in a colour of its own that nothing else uses and renamed after.
INK, MUTED, RULE, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
BLUE, TEAL, OCHRE, RED, GREY, VIOLET = "#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04", "#0a0c05", "#0a0c06"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "card",
    BLUE: "blue",
    TEAL: "teal",
    OCHRE: "ochre",
    RED: "red",
    GREY: "grey",
    VIOLET: "violet",
}
_POINTS_PER_INCH = 72
TEXT_SIZE = 12.0
# Elements that carry data get an id with this word in it: tests look for them, and so can a reader's own style sheet.
MARK = "mark"


_SETTINGS: Any = {  # matplotlib 3.11 types the keys one by one, earlier ones as text
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",
    "text.parse_math": False,
    "font.size": TEXT_SIZE,
    "axes.linewidth": 1.0,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    **dict.fromkeys(("text.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "figure.edgecolor"), "none"),
    **dict.fromkeys(("lines.solid_capstyle", "lines.solid_joinstyle"), "round"),
}


@contextmanager
def sheet(width: int, height: int) -> Iterator["Figure"]:
    """A blank figure of that many CSS pixels, deaf to the user's own matplotlib settings."""
    # The import fails by a backend that there is not, and none is used here.
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH))


def plain_axes(axes: "Axes", *, grid: str) -> None:
    """Bare axes: a baseline, a light grid along one axis ("x" or "y"), no box and no tick marks."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(visible=True, axis="x" if grid == "x" else "y")
    axes.set_axisbelow(True)


def to_svg(figure: "Figure", *, prefix: str, title: str, description: str) -> str:
    """The figure as an inline <svg> in the page's own colours and font, every id beginning with the prefix."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    # The drawing's own <style> would reach the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    body = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body).replace("url(#", f"url(#{prefix}-")
    for sentinel, variable in _VARIABLES.items():
        body = body.replace(sentinel, f"var(--{variable})")
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    width, height = (round(side * _POINTS_PER_INCH) for side in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body.strip()}</svg>"
    )
