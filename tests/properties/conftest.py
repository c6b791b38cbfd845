"""Spares Tier 1 what takes long and proves nothing: waiting for a disk, and looking for garbage where there is none."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No law can cut the power, so none can tell whether a flushed file is on the disk; a wrong handle still fails."""
    with patch.object(os, "fsync", lambda handle: os.fstat(handle) and None):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; nobody changes it."""
    from support.workplace import make_model  # not above: the process that hands out tests reads this file, too

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven rows: no multiple of any batch size used here; nobody changes them."""
    from support.workplace import make_data

    return make_data(tmp_path_factory.mktemp("data") / "rows.jsonl", 11)


@pytest.fixture(scope="session", autouse=True)
def no_search_through_everything() -> None:
    """What was imported stays, and little of the rest is garbage: looking for it, again and again, took a tenth."""
    gc.freeze()
    gc.set_threshold(50_000, gc.get_threshold()[1], 1_000)
