"""`check`: hold a subject to a law, and fail with what was expected and what came."""

from collections.abc import Mapping, Sequence
from functools import cache

_MOST = 600
"""Letters of evidence that a finding quotes; more would hide it."""
_WHOLE = 160
"""Up to so many letters both sides are quoted whole; of more, the first place where they differ."""
_AROUND = 24
"""Letters that are quoted on both sides of where two texts differ."""


class LawFailure(AssertionError):  # noqa: N818  # no error of the suite: it is what the suite looks for
    """A law does not hold: what was expected, and what came.

    `law` is its id where the check of one law may find that another is broken, as in a stateful one; "" elsewhere.
    """

    def __init__(self, expected: object, got: object, law: str = "") -> None:
        self.law = law
        self.expected, self.got = told_apart(expected, got)
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
    """Hold a subject to a law of sameness.

    Raises:
        LawFailure: the two differ.
    """
    if expected != got:
        raise _failure_of(law)(expected, got, law)


def told_apart(expected: object, got: object) -> tuple[str, str]:
    """Words for two values: whole where they are short, and else what differs first, at its place in both.

    Of two mappings only what differs is told.
    """
    if isinstance(expected, Mapping) and isinstance(got, Mapping) and expected != got:
        differing = [key for key in dict.fromkeys([*expected, *got]) if _at(expected, key) != _at(got, key)]
        expected, got = ({key: side[key] for key in differing if key in side} for side in (expected, got))
    whole = short(expected), short(got)
    if max(map(len, whole)) <= _WHOLE:
        return whole
    place, one, other = "", expected, got
    while (key := _first_difference(one, other)) is not None:
        place, one, other = f"{place}[{key!r}]", _at(one, key), _at(other, key)
    if isinstance(one, str) and isinstance(other, str):
        same = _in_common(one, other)
        alike = _in_common(one[same:][::-1], other[same:][::-1])
        start = max(0, same - _AROUND)
        parts = [short(text[start : len(text) - max(0, alike - _AROUND)]) for text in (one, other)]
        place += f" from letter {start + 1}" if start else ""
    else:
        parts = [short(one), short(other)]
    if not place or parts[0] == parts[1]:
        return whole
    return f"at {place.strip()}: {parts[0]}", f"at {place.strip()}: {parts[1]}"


_NOTHING = type("Nothing", (), {"__repr__": lambda self: "nothing there"})()


def _at(value: object, key: object) -> object:
    if isinstance(value, Mapping):
        return value.get(key, _NOTHING)
    assert isinstance(value, Sequence)
    assert isinstance(key, int)
    return value[key] if key < len(value) else _NOTHING


def _first_difference(one: object, other: object) -> object:
    """The key or the index at which two values of one kind first differ; None where they are not made of parts."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys: Sequence[object] = list(dict.fromkeys([*one, *other]))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        keys = range(max(len(one), len(other)))
    else:
        return None
    return next((key for key in keys if _at(one, key) != _at(other, key)), None)


def _in_common(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))


def short(evidence: object) -> str:
    """Words from their end, where a program says why it ended; anything else from its beginning."""
    if isinstance(evidence, str):
        return evidence if len(evidence) <= _MOST else f"... {evidence[-_MOST:]}"
    text = repr(evidence)
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."
