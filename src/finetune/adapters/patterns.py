"""Regular expressions for layers' paths, held to what can be matched in a moment.

Python's matcher tries one way after another, and PEFT hands it what an adapter's settings say: how many ways there can
be is counted before.
"""

import re
import time
from collections.abc import Iterable, Mapping
from re import _parser  # type: ignore[attr-defined]  # the only place that says what an expression consists of
from typing import Any

_LONGEST_PATH = 80
_MOST_SECONDS = 20.0
_MOST_WAYS = 10 * _LONGEST_PATH**3
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")


def check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression, or can be tried in too many ways.

    Raises:
        ValueError: it is one of these; the words say which.
    """
    try:
        re.compile(pattern)
        ways = _ways(_parser.parse(pattern), repeated=False)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if ways > _MOST_WAYS:
        raise ValueError("can be tried in too many ways: it repeats what repeats or chooses, or repeats too often")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse an adapter's settings that hold such an expression.

    Raises:
        ValueError: as `check_pattern`; the setting is named.
    """
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = settings.get(key)
        patterns = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        for pattern in patterns:
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"{key}: {pattern[:80]!r} {error}") from None


def paths_that_fit(pattern: str, paths: Iterable[str]) -> tuple[str, ...]:
    """The layers' paths that a pattern fits from end to end, as PEFT's `target_modules` is meant.

    Raises:
        ValueError: as `check_pattern`; or a path is longer than any layer's is, or they are so many that matching them
            takes too long.
    """
    check_pattern(pattern)
    ends, fitting = time.monotonic() + _MOST_SECONDS, []
    for path in paths:
        if len(path) > 2 * _LONGEST_PATH:
            raise ValueError(f"the path of a layer has {len(path)} letters")
        if re.fullmatch(pattern, path):
            fitting.append(path)
        if time.monotonic() > ends:
            raise ValueError(f"takes longer than {_MOST_SECONDS:.0f} s to match")
    return tuple(fitting)


def _ways(parts: Iterable[tuple[Any, Any]], *, repeated: bool) -> float:
    """In how many ways an expression can be tried, at most; infinitely many where what repeats does so in itself."""
    ways = 1.0
    for operation, given in parts:
        name = str(operation)
        if name in _REPEATS:
            least, most, inner = given
            choices = min(int(most), _LONGEST_PATH) - min(int(least), _LONGEST_PATH) + 1
            ways *= _ways(inner, repeated=repeated or int(most) > 1)
            if choices > 1:
                ways = ways * choices if not repeated else float("inf")
        elif name == "BRANCH":
            tried = sum(_ways(each, repeated=repeated) for each in given[1])
            ways = ways * tried if not repeated else float("inf")
        else:
            for each in given if isinstance(given, tuple) else ():
                if isinstance(each, _parser.SubPattern):
                    ways *= _ways(each, repeated=repeated)
    return ways
