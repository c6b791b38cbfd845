"""Loads the Hypothesis profile, and keeps a history of sessions."""

import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from finetune_strategies.profiles import load_profile

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["finetune.verify.sessions"]

load_profile()

# A session that was started in the background ignores Ctrl-C, and so would every program that a law interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A browser that is already on the machine; none is ever downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}) is on PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield opened
        opened.close()
