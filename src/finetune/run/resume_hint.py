"""Says what is left of a run that ended before its time, and how to go on with it."""

import shlex

from finetune.run.checkpoints import CheckpointStore
from finetune.run.folder import RunFolder


def resume_hint(folder: RunFolder, *, launch: str = "") -> tuple[str, str]:
    """What the run in `folder` has kept, and the command that goes on from there; "" where there is nothing to go on.

    Args:
        launch: the options that start its processes, such as `--launch torchrun --processes 2`.
    """
    if not folder.plan.exists():
        return "nothing had been written yet", ""
    newest = CheckpointStore(folder.checkpoints).newest()
    kept = f"the checkpoint of step {newest} is intact" if newest else "no checkpoint had been written yet"
    words = ["ft train --resume", *([launch] if launch else []), "--output", shlex.quote(str(folder.path))]
    return kept, f"go on with: {' '.join(words)}"
