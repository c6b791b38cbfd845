"""The documentation site, built as CI builds it and read in a real browser."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from repo.page_examples import ROOT, user

pytest.importorskip("material", reason="needs mkdocs-material: pip install 'finetune-suite[docs]'")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGES = [page.stem for page in sorted((ROOT / "docs").glob("*.md"))]


def built(root: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What the site's build says. Never with --quiet: mkdocs then counts no warning, and nothing fails the build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = user(NO_MKDOCS_2_WARNING="1", PYTHONWARNINGS="ignore")
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from these sources."""
    folder = tmp_path_factory.mktemp("site")
    done = built(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def opened(browser: "Browser", width: int) -> tuple["Page", list[str]]:
    """A page of a browser, and a list of what goes wrong on it and of what it asks for, as both come."""
    page, told = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("request", lambda request: told.append(request.url))
    page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: told.append(f"error: {error}"))
    page.on("response", lambda response: response.status < 400 or told.append(f"{response.status}: {response.url}"))
    return page, told


@pytest.mark.parametrize("width", [1200, 360])
def test_site_asks_nobody_else_and_fits_the_screen(browser: "Browser", address: str, width: int) -> None:
    """No page of at least 13 asks another host for anything, has an error, or is wider than its screen."""
    page, told = opened(browser, width)
    assert len(PAGES) >= 25
    wide = []
    for name in PAGES:
        page.goto(f"{address}{name}.html")
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            wide.append(name)
    page.wait_for_load_state("networkidle")
    page.close()
    assert wide == []
    assert len(told) >= len(PAGES)
    assert [line for line in told if not line.startswith(address)] == []


def test_site_finds_a_setting(browser: "Browser", address: str) -> None:
    """Searching for one word of a setting's name works, and leads to the page where the word stands."""
    page, told = opened(browser, 1200)
    page.goto(f"{address}index.html")
    page.locator("input.md-search__input").press_sequentially("max_grad_norm")
    page.locator("a.md-search-result__link").first.click()
    page.wait_for_url("**/settings.html*")
    page.close()
    assert [line for line in told if not line.startswith(address)] == []


def test_site_can_be_opened_from_a_disk(browser: "Browser", site: Path) -> None:
    """Without a server a page has its style and its pictures, its links lead to pages, and search finds a setting."""
    page, _ = opened(browser, 1200)
    page.goto((site / "index.html").as_uri())
    assert page.evaluate("getComputedStyle(document.querySelector('.md-header')).position") == "sticky"
    assert page.evaluate("[...document.querySelectorAll('article img')].every(one => one.naturalWidth > 500)")
    page.locator("article a", has_text="your first fine-tune").click()
    page.wait_for_url(re.compile("tutorial.html$"))
    page.locator("input.md-search__input").press_sequentially("max_grad_norm")
    page.locator("a.md-search-result__link").first.click()
    page.wait_for_url(re.compile("settings.html"))
    page.close()


@pytest.mark.parametrize(
    ("page", "text", "named"),
    [
        ("index.md", "[there](nowhere.md)", "nowhere.md"),
        ("index.md", "[there](index.md#nowhere)", "#nowhere"),
        ("index.md", "[there](/settings.md)", "/settings.md"),
        ("index.md", '--8<-- "nowhere.md"', "nowhere.md"),
        ("lost.md", "# Lost", "lost.md"),
    ],
)
def test_site_that_leads_nowhere_is_not_built(page: str, text: str, named: str, tmp_path: Path) -> None:
    """A link, an anchor or an inserted file that is not there, or a page without a way to it, fails the build."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "ARCHITECTURE.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    done = built(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert named in done.stdout + done.stderr
