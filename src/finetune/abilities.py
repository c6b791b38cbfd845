"""What each backend needs and can do, known without importing a framework; nobody asks for a backend by its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from finetune.errors import MissingExtraError, UsageError, install_line


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one backend needs and can do.

    Attributes:
        libraries: those that it needs beyond what is always installed.
        devices: where it computes; a GPU only on a machine that has one.
        memory: whether it measures the memory of training, in a process of its own.
        launchers: those whose processes it joins, each with the library that brings it.
        checkpointing: whether blocks can be computed again for their gradients, which saves memory.
        schemes: how a base may be quantised for it: by words of the setting model.quantize, names of `models.quantize`.
        reads_once: whether it computes a prompt that rows of a batch share once, where nothing is learned.
    """

    libraries: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    memory: bool = False
    launchers: Mapping[str, str] = field(default_factory=dict)
    checkpointing: bool = False
    schemes: Mapping[str, str] = field(default_factory=dict)
    reads_once: bool = False


ABILITIES: dict[str, Abilities] = {
    "torch": Abilities(
        libraries=("torch", "transformers", "peft"),
        devices=("cpu", "gpu"),
        memory=True,
        launchers={"torchrun": "torch", "accelerate": "accelerate"},
        reads_once=True,
        checkpointing=True,
        schemes={"4bit": "nf4", "8bit": "int8", "fp4": "fp4"},
    ),
    "mlx": Abilities(
        libraries=("mlx", "mlx_lm"),
        devices=("cpu", "gpu"),
        memory=True,
        launchers={"mlx.launch": "mlx"},
        checkpointing=True,
        schemes={"4bit": "affine", "8bit": "affine"},
    ),
    "reference": Abilities(),
}
ONE_THREAD = 5_000_000
"""Up to how many parameters a model computes in one thread with torch: more would wait for each other."""
QUANTISING = " or ".join(name for name, able in ABILITIES.items() if able.schemes)
"""The backends that can train on a quantised base, in words."""


def require_backend(name: str) -> None:
    """Refuse a backend that cannot be opened here; nothing is imported.

    Raises:
        MissingExtraError: its libraries are not installed; the extra to install is named.
        UsageError: this version has no such backend.
    """
    if name not in ABILITIES:
        raise UsageError(f"backend {name!r} is not in this version", hint=f"choose one of: {', '.join(ABILITIES)}")
    missing = [library for library in ABILITIES[name].libraries if find_spec(library) is None]
    if missing:
        raise MissingExtraError(
            f"backend {name!r} needs {', '.join(missing)}, which is not installed",
            hint=install_line(name),
        )
