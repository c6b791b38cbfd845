"""Takes the pictures of the pages, of a finished run of the demo: `make pictures`.

The terminal is drawn by Rich from what `ft report` prints, the report is opened in Chromium; both light and dark.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI, TerminalTheme
from rich.text import Text

FOLDER = Path(__file__).resolve().parent / "pictures"
COLUMNS = 100
LIGHT = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [
        (36, 41, 47),
        (207, 34, 46),
        (17, 99, 41),
        (125, 78, 0),
        (9, 105, 218),
        (130, 80, 223),
        (27, 124, 131),
        (110, 119, 129),
    ],
)
# Rich's own page loads its font from another host; here it is the reader's own.
PAGE = """<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def terminal(run: Path) -> None:
    """What `ft report` prints of a run, as two drawings."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    command = [str(Path(sys.executable).with_name("ft")), "report", str(run)]
    ours, theirs = os.openpty()
    with subprocess.Popen(command, env=environment, stdout=theirs) as process:
        os.close(theirs)
        said = b"".join(iter(lambda: _read(ours), b"")).decode().replace("\r\n", "\n")
    assert process.returncode == 0, said
    for name, theme in (("light", LIGHT), ("dark", MONOKAI)):
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        console.print(Text.from_ansi(said.replace(str(run), "runs/demo").replace(run.name, "demo").rstrip()))
        drawing = console.export_svg(title="ft train", theme=theme, code_format=PAGE, unique_id=name)
        (FOLDER / f"terminal-{name}.svg").write_text(drawing, encoding="utf-8")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # so Linux says that nobody writes any more
        return b""


def report(run: Path) -> None:
    """The first screen of a run's report, as two photographs."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme=name)  # type: ignore[arg-type]
            page.goto((run / "report.html").resolve().as_uri())
            page.screenshot(path=FOLDER / f"report-{name}.png")
        browser.close()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    newest = max(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime).parent
    terminal(newest)
    report(newest)
