"""Runs one of our own modules in a fresh process: one JSON request in, one JSON answer out."""

import json
import subprocess
import sys
from typing import Any

from finetune.errors import EvidenceError


def ask_child(module: str, request: dict[str, Any], *, timeout: float = 600) -> dict[str, Any]:
    """Run `python -m module`, hand it `request` on standard input and return the object it prints last.

    Args:
        timeout: seconds; the child is killed when it takes longer.

    Raises:
        EvidenceError: the child failed, took too long or printed no answer; its last words are quoted.
    """
    command = [sys.executable, "-m", module]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise EvidenceError(f"{module} took longer than {timeout:.0f} s and was stopped") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvidenceError(f"{module} ended with code {done.returncode}: {words[:300]}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise EvidenceError(f"{module} printed no answer: {done.stdout[-200:]!r}") from None
    return answer
