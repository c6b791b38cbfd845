"""A trainer's side of the protocol: answers questions that come as lines of JSON, in the trainer's environment.

Nothing but the standard library is used here, so that this file can be read by any Python of 3.9 or later.

A question is `{"ask": ability, "with": {...}}`. Its answer has one key: `answer` with an object, `refused` with the
trainer's own words (it will not do that), `unsupported` with words (it has no such thing), or `error` with a
traceback. The first line of all says who answers: `{"hello": 1, "name": ..., "versions": {...}, "abilities": {...}}`;
each ability is given with "", or with why it is missing.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROTOCOL = 1


class RefusesError(Exception):
    """The trainer itself refuses what it was asked for; its words say why."""


class UnsupportedError(Exception):
    """The trainer has nothing of the kind; no law is judged by that."""


def answer_to(
    handlers: Mapping[str, Callable[..., object]],
    ability: str,
    arguments: Mapping[str, object],
    refusals: Sequence[type[Exception]] = (),
) -> dict[str, Any]:
    """What one question comes to, whatever happens.

    Args:
        handlers: a function of keyword arguments for each ability; it returns an object of JSON.
        refusals: exceptions of the trainer's that mean it refuses.
    """
    if ability not in handlers:
        return {"unsupported": f"there is no ability {ability!r}"}
    try:
        return {"answer": handlers[ability](**arguments)}
    except UnsupportedError as error:
        return {"unsupported": str(error)}
    except Exception as error:
        if isinstance(error, (RefusesError, *refusals)):
            return {"refused": str(error) or type(error).__name__}
        return {"error": traceback.format_exc()}
    except (SystemExit, GeneratorExit):
        return {"error": "it ended the process:\n" + traceback.format_exc()}


def guarded(handlers: Mapping[str, Callable[..., object]], own: str) -> dict[str, Callable[..., Any]]:
    """Handlers for a trainer of others', whose every exception is its way to refuse; those of our side stay errors.

    Args:
        own: the folder of the programs that ask it.
    """

    def guard(handler: Callable[..., object]) -> Callable[..., Any]:
        def guarded_handler(**arguments: object) -> Any:
            try:
                return handler(**arguments)
            except (RefusesError, UnsupportedError):
                raise
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                if os.path.dirname(os.path.abspath(frames[-1].filename)) == own:
                    raise
                raise RefusesError(f"{type(error).__name__}: {error}") from error

        return guarded_handler

    return {ability: guard(handler) for ability, handler in handlers.items()}


def serve(
    name: str,
    versions: Mapping[str, str],
    handlers: Mapping[str, Callable[..., object]],
    *,
    missing: Mapping[str, str] | None = None,
    refusals: Sequence[type[Exception]] = (),
) -> None:
    """Answer until there are no more questions.

    What a trainer prints goes to standard error: standard output is for answers alone.

    Args:
        missing: abilities that the trainer lacks, each with the reason.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    abilities = {**dict.fromkeys(handlers, ""), **(missing or {})}

    def say(value: Mapping[str, object]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    say({"hello": PROTOCOL, "name": name, "versions": versions, "abilities": abilities})
    for line in sys.stdin:
        question = json.loads(line)
        say(answer_to(handlers, question["ask"], question.get("with", {}), refusals))
