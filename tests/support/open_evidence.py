"""Evidence of runs on open answers: one that learned, and one of each kind that did not."""

import random
from dataclasses import replace

from finetune.criteria.evidence import MatchingEvidence, OpenEvidence, Paired


def shifted(base: tuple[float, ...], by: float, spread: float = 0.0, seed: int = 0) -> Paired:
    """The same rows after a run that moved each by about so much."""
    rng = random.Random(seed)
    return Paired(base, tuple(loss + by + rng.gauss(0, spread) for loss in base))


def matching(base: int, tuned: int, count: int = 32) -> MatchingEvidence:
    """So many rows whose own answer is the likeliest of four, before and after."""
    marks = [tuple(place < right for place in range(count)) for right in (base, tuned)]
    return MatchingEvidence(marks[0], marks[1], 4)


def evidence(**parts: object) -> OpenEvidence:
    """A run that learned: true answers, nothing forgotten."""
    rows, neutral = tuple(2.0 + n / 50 for n in range(64)), tuple(2.5 + n / 40 for n in range(16))
    sound = OpenEvidence(
        goal="style",
        rows=matching(9, 22),
        losses=shifted(rows[:24], -1.5),
        unseen=shifted(rows, -0.44, 0.2),
        association=None,
        text=shifted(neutral, 0.016, 0.01),
        own_answers=shifted(neutral, 0.27, 0.2),
        right=((True,) * 16 + (False,) * 11, (True,) * 13 + (False,) * 14),
        ended=(True,) * 16,
        copied=(0.1,) * 16,
        longest=60,
        uniform=10.8,
    )
    return replace(sound, **parts)  # type: ignore[arg-type]


ROWS = evidence().unseen.base
SHUFFLED = {"rows": matching(12, 7)}
NULL_KINDS: dict[str, tuple[dict[str, object], str]] = {
    "nothing": (
        {
            "rows": matching(12, 12),
            "unseen": shifted(ROWS, -1e-4),
            "right": ((True,) * 16,) * 2,
        },
        "claim-unseen",
    ),
    "shuffled labels": (
        {**SHUFFLED, "unseen": shifted(ROWS, -0.09, 0.2), "right": ((True,) * 16, (True,) * 2 + (False,) * 14)},
        "claim-retention",
    ),
    "shuffled labels, nothing forgotten": ({**SHUFFLED, "unseen": shifted(ROWS, -0.3, 0.1)}, "claim-rows"),
    "forgot": (
        {"unseen": shifted(ROWS, 0.8, 0.3), "text": shifted(evidence().text.base, 0.59, 0.1)},
        "claim-retention",
    ),
    "memorised": ({"unseen": shifted(ROWS, 0.3, 0.2), "copied": (0.9,) * 16}, "claim-recites"),
    "no end of answer": ({"ended": (False,) * 16}, "claim-ends"),
}
