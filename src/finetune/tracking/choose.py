"""Finds trackers by their names; nothing is imported until one is opened."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from finetune.errors import MissingExtraError
from finetune.tracking.tracker import Tracked, Tracker

NAMES = ("tensorboard", "trackio", "wandb", "mlflow")
"""Every tracker; its name is that of its package, of its extra and of its file here."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed; nothing is imported.

    Raises:
        MissingExtraError: the packages are not installed; what to install is named.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"tracking.to asks for {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed",
            hint=f"pip install 'finetune-suite[{','.join(missing)}]', or leave it out of tracking.to",
        )


def open_tracker(name: str, tracked: Tracked) -> Tracker:
    """The tracker of this name, ready to be told of the run."""
    tracker: Tracker = import_module(f"finetune.tracking.{name}").TRACKER(tracked)
    return tracker
