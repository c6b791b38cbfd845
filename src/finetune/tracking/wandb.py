"""Weights & Biases: online for who is logged in, otherwise offline files that `wandb sync` uploads later."""

import os
from collections.abc import Mapping
from typing import Any

from finetune.tracking.tracker import NOTHING, Tracked


class WeightsAndBiases:
    """Writes `wandb/` where the run was started (`WANDB_DIR` moves it, `WANDB_MODE` chooses online or offline)."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "")
        if not mode:
            # Who is not logged in would be asked for a key in the middle of a run, or refused.
            mode = "online" if wandb.login(prompt=False) else "offline"
        self._run: Any = wandb.init(
            project=tracked.project,
            name=tracked.name,
            id=tracked.id,
            config=dict(tracked.parameters),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        # Offline nobody can say what is there already: a killed process loses the last seconds. So each offline
        # folder holds the run from its beginning, and the newest is the one to sync.
        self.last_step = NOTHING if self._run.offline else int(self._run.step) - 1
        self.place = str(self._run.settings.sync_dir if self._run.offline else self._run.url or mode)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand over one step, whole."""
        self._run.log(dict(numbers), step=step, commit=True)

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Put how the run ended into its summary, and wait until all is written."""
        self._run.summary.update({**words, **numbers})
        self._run.finish(exit_code=0 if complete else 1)


TRACKER = WeightsAndBiases
