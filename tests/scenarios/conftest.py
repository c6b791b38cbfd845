"""What several scenarios begin with."""

import subprocess
from types import SimpleNamespace

import pytest

from finetune import processes


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes in which this one reads what was saved begin with the libraries imported (`support.warm`)."""
    from support.processes import run_warm  # not above: the process that hands out tests reads this file, too

    started = SimpleNamespace(run=run_warm, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(processes, "subprocess", started)
