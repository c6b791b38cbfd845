"""TensorBoard: event files in the run folder, with no more than the tensorboard package."""

import time
from collections.abc import Mapping

from finetune.tracking.tracker import NOTHING, Tracked


class TensorBoard:
    """Writes `tensorboard/` in the run folder; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, tracked: Tracked) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = tracked.folder / "tensorboard"
        self.place = str(folder)
        self.last_step = NOTHING
        self._writer = EventFileWriter(self.place)
        # Readers forget all steps from 0 on: what a killed process told is told again, from the beginning.
        self._add(0, session_log=SessionLog(status=SessionLog.START))
        shown = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in tracked.parameters.items()
        }
        self._add(0, summary=hparams_pb(shown, trial_id=tracked.id))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one step, and have it on disk."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add(step, summary=Summary(value=values))
        self._writer.flush()

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Write how the run ended as a table, and close the file."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        described = {**words, **{name: f"{number:.6g}" for name, number in numbers.items()}}
        rows = "".join(f"\n|{name}|{value}|" for name, value in described.items())
        if complete:
            self._add(0, summary=text_pb("run", f"|what|said|\n|---|---|{rows}"))
        self._writer.close()

    def _add(self, step: int, **content: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))


TRACKER = TensorBoard
