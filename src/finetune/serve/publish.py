"""Publishes a model in Ollama under its name only after it was created and verified under a temporary one.

So the name means one whole model at any time: the former or the new one.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from finetune.errors import DeploymentError, FineTuneError, OutputError
from finetune.serve.ollama import Ollama, OllamaRecipe

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file that was uploaded, by its name and its digest."""

    name: str
    digest: str


def check_free(server: Ollama, name: str, *, replace: bool) -> None:
    """Refuse a name that is taken, unless it may be replaced.

    Raises:
        OutputError: a model has that name, and `replace` is false.
    """
    if not replace and _named(server, name):
        raise OutputError(f"{server.address} has a model {name} already", hint="choose another --name, or --replace it")


def place_model(server: Ollama, name: str, blob: Blob, recipe: OllamaRecipe, *, verify: Callable[[str], T]) -> T:
    """Create a model, verify it, and give it its name, whatever that meant before; returns what `verify` does.

    Args:
        verify: is called with the name that the model has at first, and raises where it is not as it should be.

    Raises:
        DeploymentError: something failed; the message says what the name means now, and what may be left.
    """
    before = _named(server, name)
    with _staged(server, name, before) as staging:
        server.create(staging, blob.name, blob.digest, recipe)
        verified = verify(staging)
        server.copy(staging, name)
        if _named(server, name) != _named(server, staging):
            raise DeploymentError(
                f"{name} at {server.address} is not what was created and verified",
                hint="see whether others deploy there, too",
            )
    return verified


def _named(server: Ollama, name: str) -> str:
    """The digest of the model of that name, or "". Ollama takes names that differ by case alone for one."""
    return next((mark for known, mark in server.listed().items() if known.lower() == name.lower()), "")


@contextlib.contextmanager
def _staged(server: Ollama, name: str, before: str) -> Iterator[str]:
    """A temporary name under which a model is made and verified; it is gone afterwards.

    Raises:
        DeploymentError: what went wrong within, with what the name means now.
    """
    model, _, tag = name.rpartition(":")
    staging = f"{model}:{tag[:60]}-part-{secrets.token_hex(4)}"
    try:
        yield staging
    except FineTuneError as error:
        told = f"{_state(server, name, before)}; {_removed(server, staging)}"
        raise DeploymentError(f"{error.message}; {told}", hint=error.hint) from None
    except BaseException:
        _removed(server, staging)
        raise
    if left := _removed(server, staging, must=True):
        raise DeploymentError(
            f"{name} at {server.address} is deployed and verified, but {left}", hint=f"ollama rm {staging}"
        )


def _state(server: Ollama, name: str, before: str) -> str:
    """What a name means after a failure, in words."""
    try:
        now = _named(server, name)
    except FineTuneError:
        return f"what {name} means now cannot be seen, for the server does not answer"
    if now == before:
        return f"{name} means what it meant before" if before else f"there is no model {name}"
    return f"{name} means the new model" if now else f"there is no model {name} any more"


def _removed(server: Ollama, staging: str, *, must: bool = False) -> str:
    """Remove the temporary name; "" where that worked and it had to be there, else what is left, in words."""
    try:
        if must or _named(server, staging):
            server.delete(staging)
    except FineTuneError:
        return f"{staging} may be left there: remove it with `ollama rm {staging}`"
    return "" if must else "nothing half made is left"
