"""What many laws fine-tune."""

from pathlib import Path

import pytest


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
