"""Laws of choosing a model for the memory at hand, and of asking a fresh process what a framework takes."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.evidence import memory as measure
from finetune.evidence.memory import measure_framework
from finetune.memory.scale import GIB, Scale, available_memory, scale_to_memory

LARGE, SMALL = Scale("microsoft/DialoGPT-small", 4), Scale("distilgpt2", 2)


@given(st.integers(0, 64 * GIB))
@example(16 * GIB)
@example(16 * GIB + 1)
@example(8 * GIB)
@example(8 * GIB + 1)
def test_scale_is_the_strategys(available: int) -> None:
    """Above 16 GiB the larger hub model with four rows, above 8 the smaller with two, else a shipped model alone."""
    wanted = LARGE if available > 16 * GIB else SMALL if available > 8 * GIB else None
    assert scale_to_memory(available) == wanted


def test_available_memory_is_of_this_machine() -> None:
    """There is some memory, in bytes, and no more than the machine has."""
    import psutil

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
