"""The frameworks that can train, each in a room of its own; nothing is imported until it is asked for."""

from importlib import import_module

from finetune.abilities import require_backend
from finetune.ports import Backend


def open_backend(name: str) -> Backend:
    """The backend by its name.

    Raises:
        UsageError, MissingExtraError: as `require_backend`.
    """
    require_backend(name)
    backend: Backend = import_module(f"finetune.backends.{name}.backend").BACKEND()
    return backend
