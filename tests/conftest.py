"""Loads the Hypothesis profile, keeps a history of sessions, and spares tests what takes long and proves nothing."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest.mock import patch

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


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No law can cut the power, so none can tell whether a flushed file is on the disk; a wrong handle still fails."""
    with patch.object(os, "fsync", lambda handle: os.fstat(handle) and None):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_search_through_everything() -> None:
    """What was imported stays, and little of the rest is garbage: looking for it, again and again, took a tenth."""
    gc.freeze()
    gc.set_threshold(50_000, gc.get_threshold()[1], 1_000)


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
