"""Where words go: data to standard output, everything else to standard error."""

import json
import sys
from typing import TYPE_CHECKING, Any

from finetune.words import in_a_line, without_secrets

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """Tell the user something that is not data."""
    sys.stderr.write(in_a_line(without_secrets(text)) + "\n")
    sys.stderr.flush()


def print_data(text: str) -> None:
    """Print a result; on a terminal no control character in it acts."""
    text = in_a_line(text) if sys.stdout.isatty() else text
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print a result as JSON."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    text = json.dumps(value, indent=1, ensure_ascii=encoding not in ("utf-8", "utf8"), allow_nan=False)
    # Halves of letters, as broken text has them, are written as JSON escapes them.
    print_data(text.encode("utf-8", "backslashreplace").decode())


def print_examined(done: Any, *, as_json: bool, place: str | None = None) -> None:
    """Print a written and checked result: its path as data, notes and checks beside it; or all as JSON."""
    for note in done.notes:
        say(f"note: {note}")
    for check in done.checks:
        say(f"{check.stage}: {check.measured}")
    if as_json:
        print_json(done.as_dict())
        return
    print_data(place or str(done.path))


def exit_code(outcome: str, *, allow_inconclusive: bool = False) -> int:
    """0 passed, 1 failed, 4 neither; `allow_inconclusive` turns the 4 of an inconclusive outcome into 0."""
    from finetune.records import Outcome

    if allow_inconclusive and outcome == Outcome.INCONCLUSIVE:
        return 0
    return {Outcome.PASSED: 0, Outcome.FAILED: 1}.get(Outcome(outcome), 4)


def data_console() -> "Console":
    """A rich console on standard output; plain and 100 columns wide unless that is a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=100, no_color=True)
