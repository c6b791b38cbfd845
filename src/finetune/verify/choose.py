"""A subject by its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from finetune.abilities import require_backend
from finetune.errors import UsageError
from finetune.verify.ours import Ours
from finetune.verify.subjects import ScenarioSubject

BACKENDS = ("reference", "torch", "mlx")
"""Our own trainer goes by the name of its backend."""


@contextmanager
def opened_subject(name: str) -> Iterator[ScenarioSubject]:
    """Our own trainer with a backend, or what `module:Class` makes when it is called; closed in the end.

    Raises:
        UsageError: there is no such subject.
        MissingExtraError: the backend's libraries are not installed.
    """
    subject = _made(name)
    try:
        yield subject
    finally:
        close = getattr(subject, "close", None)
        if close is not None:
            close()


def _made(name: str) -> ScenarioSubject:
    if name in BACKENDS:
        require_backend(name)
        return Ours(name)
    module, colon, maker = name.partition(":")
    hint = f"choose one of: {', '.join(BACKENDS)}; or write module:Class of one that can be imported"
    if not colon or not module or not maker:
        raise UsageError(f"there is no subject {name!r}", hint=hint)
    try:
        made: ScenarioSubject = getattr(import_module(module), maker)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(f"the subject {name!r} cannot be made: {error}", hint=hint) from None
    if not isinstance(getattr(made, "name", None), str):
        raise UsageError(f"{name!r} is no subject: it has no name", hint=hint)
    return made
