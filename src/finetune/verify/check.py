"""`check`: hold a subject to a law, and fail with what was expected and what came."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

_MOST = 600
"""Letters of evidence that a finding quotes; more would hide it."""


class LawFailure(AssertionError):  # noqa: N818  # no error of the suite: it is what the suite looks for
    """A law does not hold: what was expected, and what came.

    `law` is its id where the check of one law may find that another is broken, as in a stateful one; "" elsewhere.
    """

    def __init__(self, expected: object, got: object, law: str = "") -> None:
        self.expected, self.got, self.law = short(expected), short(got), law
        name = f"{law}: " if law else ""
        super().__init__(f"{name}expected: {self.expected}\n  got: {self.got}")


@cache
def _failure_of(law: str) -> type[LawFailure]:
    """One type for each law: Hypothesis tells failures apart by their type, and shrinks each of them."""
    return type(f"LawFailure[{law}]", (LawFailure,), {}) if law else LawFailure


def check(holds: object, *, expected: object, got: object, law: str = "") -> None:
    """Hold a subject to a law.

    Raises:
        LawFailure: it does not hold.
    """
    if not holds:
        raise _failure_of(law)(expected, got, law)


def check_same(expected: object, got: object, *, law: str = "") -> None:
    """Hold a subject to a law of sameness; of two mappings only what differs is quoted.

    Raises:
        LawFailure: the two differ.
    """
    if expected == got:
        return
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        differing = sorted(key for key in {*expected, *got} if expected.get(key) != got.get(key))
        expected, got = _part(expected, differing), _part(got, differing)
    raise _failure_of(law)(expected, got, law)


def _part(values: Mapping[str, object], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def short(evidence: object) -> str:
    """Words from their end, where a program says why it ended; anything else from its beginning."""
    if isinstance(evidence, str):
        return evidence if len(evidence) <= _MOST else f"... {evidence[-_MOST:]}"
    text = repr(evidence)
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."
