"""The adapter that a run goes on from: what it is called, what it weighs in on, and how a session gets it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.peft_files import MLX_WEIGHTS, SETTINGS, WEIGHTS, in_peft_format
from finetune.config import TrainingConfig
from finetune.errors import ModelError
from finetune.files import file_hash
from finetune.ports import Session


@dataclass(frozen=True, slots=True)
class Start:
    """An adapter to go on from; `name` is its run's id or its folder's name, `sha256` that of its weights."""

    name: str
    sha256: str
    folder: Path

    def put_on(self, session: Session, base: str) -> None:
        """Give the session's fresh adapter the weights of this one.

        Raises:
            ModelError: they have changed, or do not fit.
        """
        if _weights(self.folder) != self.sha256:
            raise ModelError(f"the adapter in {self.folder} has changed since this run began", hint="restore it")
        with in_peft_format(self.folder, base) as folder:
            session.start_from(folder)


@dataclass(frozen=True, slots=True)
class Beginning:
    """Losses of the adapter that a run goes on from: nats per token and tokens, on the rows of the judge."""

    fixed: tuple[float, int]
    held_out: tuple[float, int] | None


def start_of(config: TrainingConfig) -> Start | None:
    """The adapter that a run with this configuration goes on from; None where it begins with a fresh one.

    Raises:
        ModelError: it is gone.
    """
    if config.model.adapter is None:
        return None
    folder = Path(config.model.adapter)
    run = folder.parent / "run.json"
    return Start(folder.parent.name if run.exists() else folder.name, _weights(folder), folder)


def begun(start: Start | None, beginning: Beginning | None) -> dict[str, Any] | None:
    """What run.json says of the adapter that a run went on from: no path, but what it can be known by."""
    if start is None:
        return None
    return {
        "name": start.name,
        "sha256": start.sha256,
        "optimizer": "fresh",
        **(asdict(beginning) if beginning else {}),
    }


def begun_note(start: Start, beginning: Beginning, base: float) -> str:
    """What a reader of the report must know of a run that goes on from an adapter."""
    return (
        f"training went on from the adapter {start.name} ({start.sha256[:12]}) with a fresh optimizer: on the same "
        f"training rows the loss was {base:.4f} for the base and {beginning.fixed[0]:.4f} for that adapter; the "
        "verdict compares with the base, so it speaks of both trainings together (of preferences with that adapter)"
    )


def _weights(folder: Path) -> str:
    for name in (WEIGHTS, MLX_WEIGHTS):
        if (folder / name).is_file():
            return file_hash(folder / name)
    pickled = (folder / "adapter_model.bin").exists()
    told = "holds adapter_model.bin alone, which could run code as it is read" if pickled else f"holds no {WEIGHTS}"
    hint = "save it again as safetensors" if pickled else f"restore it, or name a folder with {SETTINGS} and weights"
    raise ModelError(f"the adapter to go on from, {folder}, {told}", hint=hint)
