"""The log of a run as evidence: each line holds a check of itself and of all before it, so that no change is silent."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import OutputError
from finetune.events import Event, FixedLoss, RunJudged, RunStarted, StepDone, event_as_dict, event_from_dict
from finetune.files import storage_errors, write_bytes
from finetune.reading import read_bytes

_MOST_BYTES = 2**29
_MARK = b', "check": "'
_END = b'"}'


class EventLog:
    """Events as lines of JSON in a file; `check` at the end of each is a hash of the line and of the check before it.

    A killed process can leave the last line half written. What it told is done again on resume, so that such a line
    counts as none; anything else that is not as it was written is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = (0, b"")  # the length of what is known to be whole, and its last check

    def append(self, event: Event) -> None:
        """Write one event behind the others; half a line that a killed process has left goes first.

        Raises:
            OutputError: a line before it is not as it was written.
        """
        with storage_errors(self.path):
            size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._end[0]:
            lines = list(self.lines())
            self._end = (sum(map(len, lines)), _check_of(lines[-1]) if lines else b"")
        with storage_errors(self.path), self.path.open("ab") as file:
            if size != self._end[0]:
                file.truncate(self._end[0])
            line = _checked(_plain(event), self._end[1])
            file.write(line)
        self._end = (self._end[0] + len(line), _check_of(line))

    def read(self) -> list[Event]:
        """Every event that was logged whole; none where nothing was logged.

        Raises:
            OutputError: a line is not as it was written.
        """
        return [event_from_dict(json.loads(line)) for line in self.lines()]

    def up_to(self, done: int) -> list[Event]:
        """What was logged up to the checkpoint of step `done`.

        Raises:
            OutputError: as `read`, or the steps up to `done` are not all there.
        """
        kept = [event for event in self.read() if _stays(event, done)]
        steps = [event.step for event in kept if isinstance(event, StepDone)]
        if steps != list(range(1, done + 1)):
            raise OutputError(
                f"{self.path} tells of {len(steps)} of the {done} steps before the checkpoint, so it is not whole",
                hint="restore it, or start a new run with another --output",
            )
        return kept

    def rewind(self, done: int) -> None:
        """Forget what was logged after the checkpoint of step `done`.

        Raises:
            OutputError: as `up_to`.
        """
        content, last = b"", b""
        for event in self.up_to(done):
            line = _checked(_plain(event), last)
            content, last = content + line, _check_of(line)
        write_bytes(self.path, content)
        self._end = (len(content), last)

    def lines(self) -> Iterator[bytes]:
        """The lines that are whole, each with its end.

        Raises:
            OutputError: one is not as it was written.
        """
        try:
            content = read_bytes(self.path, _MOST_BYTES) if self.path.exists() else b""
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror}", hint="restore it") from None
        *lines, _ = content.split(b"\n")
        last = b""
        for number, line in enumerate(lines, 1):
            plain, mark, _ = line.rpartition(_MARK)
            if not mark or _checked(plain + b"}", last) != line + b"\n":
                raise OutputError(
                    f"{self.path}:{number}: the line is not as it was written, so that nothing can be judged by it",
                    hint=f"restore the file; or delete line {number} and all that follow, if a checkpoint from before "
                    "it is to be gone on from; or start a new run with another --output",
                )
            last = _check_of(line + b"\n")
            yield line + b"\n"


def _plain(event: Event) -> bytes:
    return json.dumps(event_as_dict(event), allow_nan=False).encode()


def _checked(plain: bytes, before: bytes) -> bytes:
    """A JSON object as a line with its check."""
    check = hashlib.sha256(before + plain).hexdigest()[:16].encode()
    return plain[:-1] + _MARK + check + _END + b"\n"


def _check_of(line: bytes) -> bytes:
    return line[-len(_END) - 17 : -len(_END) - 1]


def _stays(event: Event, done: int) -> bool:
    """Whether an event tells of a step up to `done`; first gradients carry no step, and the last fixed loss is new."""
    if isinstance(event, RunStarted):
        return True
    ended = isinstance(event, RunJudged) or (isinstance(event, FixedLoss) and event.step > 0)
    return done > 0 and not ended and getattr(event, "step", 1) <= done
