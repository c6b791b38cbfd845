"""Consumers of a run's events that can do it no harm: each tracker works in a thread of its own."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread

from finetune.events import Event, TrackerFailed, TrackerOpened
from finetune.tracking.numbers import Digest
from finetune.tracking.tracker import Tracked, Tracker, open_tracker
from finetune.words import without_secrets

PATIENCE = 60.0
"""Seconds that a run waits at its end, in all, for trackers to write what they were told."""
_MOST_WAITING = 10_000
"""Events that wait for a slow tracker; later ones are counted as failed."""


class Trackers:
    """Passes a run's events to trackers; failures there are reported once each, counted, and stop nothing.

    `history` holds the events before a resume; a tracker that has some of them gets the rest.
    """

    def __init__(
        self,
        names: Sequence[str],
        tracked: Tracked,
        warn: Callable[[Event], None],
        history: Sequence[Event] = (),
    ) -> None:
        self._warn = warn
        self._lines = [_Line(name, tracked, history) for name in names]

    def __call__(self, event: Event) -> None:
        """Pass one event on; this takes no time."""
        for line in self._lines:
            line.put(event)
        self._report()

    def close(self, *, complete: bool) -> None:
        """Have everything written, as far as that takes no longer than `PATIENCE`; closing twice does nothing more."""
        for line in self._lines:
            line.end(complete=complete)
        left = PATIENCE
        for line in self._lines:
            left = line.wait(left)
        self._report()

    def places(self) -> list[dict[str, str | int | None]]:
        """For each tracker its name, where it writes (None where it could not be opened), and how often it failed."""
        return [{"tracker": line.name, "place": line.place, "failures": line.failures} for line in self._lines]

    def notes(self) -> list[str]:
        """One sentence for each tracker that failed."""
        return [
            f"the tracker {line.name} failed {line.failures} time{'s' * (line.failures > 1)}, so it does not hold all "
            f"of this run; the first time: {line.first_error}"
            for line in self._lines
            if line.failures
        ]

    def _report(self) -> None:
        for line in self._lines:
            for event in line.news():
                self._warn(event)


class _Line:
    """One tracker, its thread, and the events that wait for it."""

    def __init__(self, name: str, tracked: Tracked, history: Sequence[Event]) -> None:
        self.name = name
        self.place: str | None = None
        self.failures = 0
        self.first_error = ""
        self._tracked = tracked
        self._history = history
        self._waiting: SimpleQueue[Event | None] = SimpleQueue()
        self._complete = False
        self._ended = False
        self._told: set[str] = set()
        # The process need not wait for a tracker that hangs.
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(event)
        else:
            self._failed("it is too slow: events were lost")

    def end(self, *, complete: bool) -> None:
        if not self._ended:
            self._ended, self._complete = True, complete
            self._waiting.put(None)  # for which there is always room

    def wait(self, seconds: float) -> float:
        """Wait until the tracker is done; returns the seconds that are left."""
        started = time.monotonic()
        if self._thread.is_alive():
            self._thread.join(max(0.0, seconds))
            if self._thread.is_alive():
                self._failed(f"it was not done {PATIENCE:.0f} seconds after the run")
        return seconds - (time.monotonic() - started)

    def news(self) -> list[Event]:
        """What the user does not know yet: that the tracker opened, and its first failure."""
        events: list[Event] = []
        if self.place is not None and "place" not in self._told:
            events.append(TrackerOpened(self.name, self.place))
            self._told.add("place")
        if self.failures and "error" not in self._told:
            events.append(TrackerFailed(self.name, self.first_error))
            self._told.add("error")
        return events

    def _failed(self, error: str) -> None:
        self.first_error = self.first_error or without_secrets(error)
        self.failures += 1

    def _work(self) -> None:
        tracker: Tracker | None = None
        with self._counted():
            tracker = open_tracker(self.name, self._tracked)
            self.place = without_secrets(tracker.place)
        digest = Digest()
        waiting: Iterator[Event] = iter(self._waiting.get, None)
        for event in itertools.chain(self._history, waiting):
            for step, numbers in digest.take(event):
                self._log(tracker, step, numbers)
        # Whoever resumes the run logs an unfinished step, all of it.
        for step, numbers in digest.rest() if self._complete else ():
            self._log(tracker, step, numbers)
        if tracker is not None:
            with self._counted():
                tracker.finish(digest.words, digest.numbers, complete=self._complete)

    def _log(self, tracker: Tracker | None, step: int, numbers: dict[str, float]) -> None:
        if tracker is None:
            self._failed("it could not be opened")
        elif step > tracker.last_step:
            with self._counted():
                tracker.log(step, numbers)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Whatever a tracker raises, even an attempt to end the process, is counted."""
        try:
            yield
        except BaseException as error:
            lines = str(error).strip().splitlines()
            self._failed(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
