"""The report in a real browser: both themes, desk and phone, alone with its file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.report import render_html
from finetune.report.history import render_history
from properties.test_history import entry
from support.sample_run import sample_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

THEMES = ("light", "dark")
WIDTHS = (1200, 360)

# For every mark of every chart: the box and the best contrast of its painted colours against the card behind it.
MARKS = """() => {
  const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parse = colour => { const found = colour.match(/[\\d.]+/g); return found && found.map(Number); };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const contrast = (one, two) => {
    const [a, b] = [light(one), light(two)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return [...document.querySelectorAll("figure.chart")].map(figure => {
    const card = parse(getComputedStyle(figure).backgroundColor), svg = figure.querySelector("svg");
    const seen = (element, properties) => Math.max(0, ...properties.map(name => getComputedStyle(element)[name])
      .filter(colour => colour && colour !== "none").map(colour => contrast(parse(colour), card)));
    const painted = [...svg.querySelectorAll("[id*='-mark-'] path, [id*='-mark-'] use")]
      .filter(one => !one.closest("defs"));
    const axes = [...svg.querySelectorAll("[id*='-patch_'] path, [id*='-line2d_'] path, [id*='-line2d_'] use")]
      .filter(one => !one.closest("defs") && /ink|blue|teal/.test(one.getAttribute("style")));
    const box = svg.getBoundingClientRect();
    return {
      chart: figure.dataset.chart, width: box.width, height: box.height, label: svg.getAttribute("aria-label"),
      marks: painted.map(one => [one.parentNode.id || one.parentNode.parentNode.id, seen(one, ["stroke", "fill"])]),
      boxes: painted.map(one => { const at = one.getBoundingClientRect(); return at.width + at.height; }),
      extra: axes.map(one => seen(one, ["stroke", "fill"])),
      letters: [...svg.querySelectorAll("text")].map(one => [one.textContent, seen(one, ["fill"])]),
      black: [...svg.querySelectorAll("path, use, text, line, rect")].filter(one => !one.closest("defs, clipPath"))
        .filter(one => ["stroke", "fill"].some(name => getComputedStyle(one)[name] === "rgb(0, 0, 0)")).length,
    };
  });
}"""


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs with every chart, a hostile answer and a very long word."""
    run = sample_run(id="w" * 200, command="ft train " + "x" * 900)
    hostile = "</span></script><img src=x onerror=\"document.title='owned'\">" + "y" * 900
    run["scores"]["learning"]["tuned"]["answers"][5]["given"] = hostile
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_html([run, sample_run(id="second")]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_page_opens_without_error_or_request(browser: "Browser", report_file: Path, theme: str, width: int) -> None:
    """The page asks for nothing but itself, runs no foreign script, logs no error, and does not scroll sideways."""
    page, told = _open(browser, report_file, theme, width)
    assert told == [f"request {report_file.as_uri()}"]
    assert "owned" not in page.title()
    page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate("[...document.querySelectorAll('.text')].map(text => text.scrollWidth - text.clientWidth)")
    assert len(texts) > 50
    assert max(texts) <= 1, "an answer has to be scrolled sideways to be read"
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_charts_can_be_seen_in_the_theme(browser: "Browser", report_file: Path, theme: str, width: int) -> None:
    """Every chart has a size and a description, and every mark and letter stands out from what is behind it."""
    page, _ = _open(browser, report_file, theme, width)
    charts = page.evaluate(MARKS)
    page.close()
    assert [chart["chart"] for chart in charts] == ["comparison", *["loss", "rate", "scores", "memory", "lengths"] * 2]
    for chart in charts:
        assert chart["width"] > 200, chart["chart"]
        assert chart["height"] > 100, chart["chart"]
        assert len(chart["label"]) > 40, chart["chart"]
        assert len(chart["marks"]) >= 2, chart["chart"]
        faint = [mark for mark in [*chart["marks"], *chart["letters"]] if mark[1] < 2]
        assert not faint, (chart["chart"], theme, faint)
        assert not [value for value in chart["extra"] if value < 2], (chart["chart"], theme)
        assert min(chart["boxes"]) > 0, chart["chart"]
        assert chart["black"] == 0, (chart["chart"], "something is painted black whatever the theme")


@pytest.fixture(scope="module")
def history_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history of one session, and of two machines with a gap and a score."""
    first = entry(tier=1, cases=None, scores={"m/torch tuned": 0.9, "chain GGUF seconds": 2.0})
    more = [entry(day, tier=2, cases=day or None, platform="Darwin-arm64" * (1 + 9 * (day % 2))) for day in range(5)]
    path = tmp_path_factory.mktemp("history") / "history.html"
    path.write_text(render_history([first, *more], ["history.jsonl:9: " + "x" * 900]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_history_can_be_seen_in_the_theme(browser: "Browser", history_file: Path, theme: str, width: int) -> None:
    """The page of the history keeps the laws of the report's: alone, no wider than the screen, every mark in sight."""
    page, told = _open(browser, history_file, theme, width)
    charts = page.evaluate(MARKS)
    assert told == [f"request {history_file.as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert [chart["chart"] for chart in charts] == [
        "seconds",
        "pass-rate",
        "memory",
        "score-0",
        "score-1",
        "seconds",
        "pass-rate",
        "cases",
        "memory",
    ]
    for chart in charts:
        assert min(chart["width"], chart["height"]) > 100, chart["chart"]
        assert len(chart["marks"]) >= 1, chart["chart"]
        assert [mark for mark in [*chart["marks"], *chart["letters"]] if mark[1] < 2] == [], chart["chart"]
        assert chart["black"] == 0, chart["chart"]


@pytest.mark.parametrize("theme", THEMES)
def test_theme_button_turns_the_page_and_back(browser: "Browser", report_file: Path, theme: str) -> None:
    """The button turns background and charts to the other theme, and pressed again back."""
    page, told = _open(browser, report_file, theme, 1200)
    looks = []
    for _ in range(3):
        looks.append(page.evaluate("[getComputedStyle(document.body).backgroundColor, " + _FIRST_MARK + "]"))
        page.click("#theme")
    assert looks[0] == looks[2]
    assert looks[0][0] != looks[1][0]
    assert looks[0][1] != looks[1][1]
    assert len(told) == 1
    page.close()


def test_page_follows_the_system_theme_until_told_otherwise(browser: "Browser", report_file: Path) -> None:
    """A change of the system's theme changes the page, as long as the reader has not chosen one."""
    page, _ = _open(browser, report_file, "light", 1200)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    # The button hears of it in its own time.
    page.wait_for_function("document.getElementById('theme').textContent === 'Light'")
    page.close()


_FIRST_MARK = "getComputedStyle(document.querySelector(\"[id*='-mark-'] path\")).stroke"


def _open(browser: "Browser", path: Path, theme: Any, width: int) -> tuple["Page", list[str]]:
    """The page, and a list that tells every request, console error and uncaught exception as it happens."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.emulate_media(color_scheme=theme)
    told: list[str] = []
    page.on("request", lambda request: told.append(f"request {request.url}"))
    page.on("console", lambda message: told.append(f"console {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(f"exception {error}"))
    page.goto(path.as_uri(), wait_until="load")
    return page, told
