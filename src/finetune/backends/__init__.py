"""The frameworks that can train, each in a room of its own; nothing is imported until it is asked for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def importing_libraries() -> Iterator[None]:
    """Within this context nobody looks for garbage, nor ever again among what is there at its end.

    What a library makes as it is imported stays: looking through it took a sixth of a framework's start.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if looked:
            gc.enable()
