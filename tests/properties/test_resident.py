"""Laws of measured memory: a peak is this process's own, and it is what was held."""

import subprocess
import sys
from typing import Any

import psutil
import pytest

from finetune.evidence import memory as measure
from finetune.evidence.memory import measure_framework
from finetune.processes import available_memory

MB = 10**6
HOLDING = """
from finetune.processes import peak_rss, restart_peak
before = peak_rss()
held = bytearray(b"x" * 60_000_000)
after = peak_rss()
del held
released = peak_rss()
restart_peak()
print(before, after, released, peak_rss())
"""


def test_peak_is_what_this_process_held_and_not_its_parent() -> None:
    """A small process that a large one starts tells its own peak: it rises with what is held, stays, and restarts."""
    large = b"x" * 150 * MB
    done = subprocess.run([sys.executable, "-c", HOLDING], capture_output=True, text=True, check=True, timeout=60)
    before, after, released, restarted = (int(number) for number in done.stdout.split())
    assert before < 100 * MB < len(large)
    assert 50 * MB < after - before < 150 * MB
    assert released == after
    if sys.platform != "linux":
        pytest.skip("only Linux can forget a peak")
    assert restarted < after - 40 * MB


def test_available_memory_is_of_this_machine() -> None:
    """There is some memory, in bytes, and no more than the machine has."""
    assert 2**20 < available_memory() <= psutil.virtual_memory().total


def test_framework_is_asked_for_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's own probe is asked for the framework alone, and its figure is given back as it is."""
    asked: list[Any] = []

    def ask(module: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append((module, request))
        return {"framework_rss": 123_456, "peak_rss": 1}

    monkeypatch.setattr(measure, "ask_child", ask)
    monkeypatch.setattr(measure, "find_spec", lambda name: name)
    assert measure_framework("torch") == 123_456
    assert asked == [("finetune.backends.torch.probe", {"method": "framework"})]
