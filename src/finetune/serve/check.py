"""Compares a served model with the trained one: its prompts, its answers, and where they end."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

from finetune.errors import DeploymentError
from finetune.evidence.answers import normalise
from finetune.export.read_back import Check
from finetune.serve.expected import ServedQuestion, ServingCheck
from finetune.serve.messages import Completion, Messages
from finetune.serve.ties import Ties

_SHOWN = 80


def compare_prompts(serving_check: ServingCheck, ids_of: Callable[[Messages], Sequence[int]]) -> Check:
    """Whether the server's prompt ids are those of training."""
    prompts = (*(asked.prompt for asked in serving_check.questions), *serving_check.prompts)
    equal, first = 0, "" if prompts else "nothing could be asked"
    for prompt in prompts:
        found = tuple(ids_of(prompt.messages))
        equal += found == prompt.ids
        if found != prompt.ids and not first:
            pairs = enumerate(zip_longest(prompt.ids, found))
            place, (own, served) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            first = (
                f"the conversation {str(list(prompt.messages))[:_SHOWN]}: token {place} of its prompt is "
                f"{'missing' if own is None else own} in training and {'missing' if served is None else served} here"
            )
    return Check("template", f"{equal} of {len(prompts)} prompts are the ids trained on", "all of them", first)


def compare_answers(
    serving_check: ServingCheck,
    answer: Callable[[Messages], Completion],
    ties: Ties,
) -> tuple[Check, ...]:
    """Compare the greedy answers to the run's questions, and whether each right one ends."""
    if not serving_check.questions:
        return ()
    said = [answer(asked.prompt.messages) for asked in serving_check.questions]
    pairs = list(zip(serving_check.questions, said, strict=True))
    known = [ties.says(asked.prompt.ids) if asked.given is None else asked.given for asked, _ in pairs]
    differing = [(*pair, own) for pair, own in zip(pairs, known, strict=True) if own.strip() != pair[1].text.strip()]
    right = sum(normalise(found.text) == normalise(asked.expected) for asked, found in pairs)
    own = sum(normalise(own) == normalise(asked.expected) for (asked, _), own in zip(pairs, known, strict=True))
    odd = next((each for each in differing if not ties.explain(each[0].prompt.ids, each[1].text)), None)
    first = _difference(*odd) if odd else ""
    count = sum(not found.read for found in said)
    unread = f"; {count} are in no format that the server's chat API takes of this template" if count else ""
    answers = Check(
        "answers",
        f"{len(pairs) - len(differing)} of {len(pairs)} are the run's own; {right} right, {own} in the run{unread}",
        "equal, or diverging at a near-tie within what the file's type rounds",
        first,
    )
    # The run asks only what can be answered within its limit, so that a right answer must have ended.
    must = [(asked, found) for asked, found in pairs if normalise(found.text) == normalise(asked.expected)]
    if not must:
        return (answers,)
    endless = next((f"{found.text[:_SHOWN]!r} has no end" for _, found in must if not found.ended), "")
    ended = sum(found.ended for _, found in must)
    return answers, Check("stop", f"{ended} of {len(must)} right answers end by themselves", "all of them", endless)


def _difference(asked: ServedQuestion, found: Completion, own: str) -> str:
    question = asked.prompt.messages[-1]["content"]
    return f"to {question[:_SHOWN]!r} it says {found.text[:_SHOWN]!r}, and the run's own said {own[:_SHOWN]!r}"


def unmeasured_notes(checks: Sequence[Check]) -> tuple[str, ...]:
    """Notes on what could not be judged."""
    judged = {check.stage for check in checks}
    return () if "stop" in judged else ("where answers end was not measured: none of them was right",)


def edge_notes(serving_check: ServingCheck, ids_of: Callable[[Messages], Sequence[int]]) -> tuple[str, ...]:
    """A note where the server does not strip space as the run's template does."""
    count = sum(tuple(ids_of(prompt.messages)) != prompt.ids for prompt in serving_check.odd_prompts)
    if not count:
        return ()
    return (
        f"the server does not strip space around a message as the run's template does: {count} of "
        f"{len(serving_check.odd_prompts)} prompts with such space, or an empty message, are not as in training; strip "
        "it before you send it",
    )


def inert_notes(serving_check: ServingCheck, ids_of: Callable[[Messages], Sequence[int]]) -> tuple[str, ...]:
    """A note where the server takes a control token's name in a message for the token itself."""
    if not serving_check.stops:
        return ()
    token = serving_check.stops[0]
    number = serving_check.encoder.tokenizer.control_id(token)
    counts = [
        sum(each == number for each in ids_of(({"role": "user", "content": text},))) for text in ("ab", f"a{token}b")
    ]
    if counts[0] == counts[1]:
        return ()
    return (
        f"the server takes {token!r} within a message as the control token, where it was plain text in training: "
        "keep such words out of what strangers may send",
    )


def require_passed(*checks: Check) -> tuple[Check, ...]:
    """The checks, if all of them passed."""
    for check in checks:
        if not check.passed:
            raise DeploymentError(
                f"what is served is not what was trained, at the stage {check.stage!r}: {check.first} "
                f"({check.measured}; allowed: {check.allowed})",
                hint="this is a fault of FineTune or of the server: please report it with the run's plan.yaml",
            )
    return checks
