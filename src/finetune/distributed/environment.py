"""Which of a run's processes this is, as the launcher that started it has left it in the environment."""

from collections.abc import Mapping

from finetune.abilities import ABILITIES
from finetune.errors import RefusedError

LAUNCHERS: dict[str, tuple[str, str]] = {
    launcher: (backend, library) for backend, able in ABILITIES.items() for launcher, library in able.launchers.items()
}
"""Each launcher with the backend that understands it and the library that brings it."""
NOTES = "FT_LAUNCH"
"""Names the folder where `ft train --launch` and the processes that it has started leave notes for each other."""


def rank_of(environ: Mapping[str, str]) -> int:
    """The number of this process in its run, from 0."""
    return int(environ.get("RANK") or environ.get("MLX_RANK") or 0)


def started_by(environ: Mapping[str, str]) -> str:
    """What has started this process together with others: a launcher's name, or "" where it stands alone."""
    if int(environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in environ:
        return "accelerate" if "ACCELERATE_MIXED_PRECISION" in environ else "torchrun"
    return "mlx.launch" if environ.get("MLX_RANK") and environ.get("MLX_HOSTFILE") else ""


def launch_words(environ: Mapping[str, str], size: int) -> str:
    """The options of `ft train` that start as many processes again; "" for a single one."""
    return f"--launch {started_by(environ)} --processes {size}" if size > 1 else ""


def refuse_launched(environ: Mapping[str, str], backend: str) -> None:
    """Refuse to be one of several processes whose launcher the backend does not understand.

    Raises:
        RefusedError: each of them would take itself for the only one and make the same run.
    """
    launcher = started_by(environ)
    if launcher and LAUNCHERS[launcher][0] != backend:
        able, joining = ABILITIES[backend].launchers, (name for name, each in ABILITIES.items() if each.launchers)
        hint = (
            f"start it with {' or '.join(able)}" if able else f"use one process, or the backend {' or '.join(joining)}"
        )
        raise RefusedError(
            f"{launcher} has started several processes, and backend {backend!r} cannot join them", hint=hint
        )
