"""Laws of measured memory: a peak is this process's own, and it is what was held."""

import subprocess
import sys

import pytest

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
