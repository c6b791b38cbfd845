"""The data sets that ship with FineTune, by name: `shipped:facts`, `shipped:rehearsal`, `shipped:retention`, and
`shipped:neutral`, general questions and plain paragraphs that were written for it.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from finetune.data.facts import KINDS, Fact, known_facts, new_facts
from finetune.errors import DataError

FACTS, REHEARSAL, RETENTION = "shipped:facts", "shipped:rehearsal", "shipped:retention"
NEUTRAL = "shipped:neutral"
FOLDER = Path(__file__).resolve().parent / "sets"
_SIZE = 48
_REHEARSED_PER_KIND = 24


def data_path(name: str) -> Path:
    """The file behind a data set's name: one that ships with FineTune, or the path as given.

    Raises:
        DataError: no shipped set has this name, or the path names an unknown home folder.
    """
    if not name.startswith("shipped:"):
        try:
            return Path(name).expanduser()
        except RuntimeError:
            raise DataError(f"data file {name}: there is no such home folder", hint="write the whole path") from None
    names = (FACTS, REHEARSAL, RETENTION, NEUTRAL)
    if name not in names:
        raise DataError(f"no data set {name!r} ships with FineTune", hint=f"choose one of: {', '.join(names)}")
    return FOLDER / f"{name.removeprefix('shipped:')}.jsonl"


def shipped_facts() -> dict[str, list[Fact]]:
    """What each shipped set holds: new facts to learn, known ones to rehearse, and other known ones to be asked for.

    No known fact that is asked for is ever rehearsed: retention is measured without repetition.
    """
    sets: dict[str, list[Fact]] = {FACTS: new_facts(_SIZE, seed=0), REHEARSAL: [], RETENTION: []}
    for kind in KINDS:
        known = [fact for fact in known_facts() if fact.kind == kind]
        random.Random(f"rehearsal-{kind}").shuffle(known)
        sets[REHEARSAL] += known[:_REHEARSED_PER_KIND]
        sets[RETENTION] += known[_REHEARSED_PER_KIND:]
    return sets


def facts_as_jsonl(facts: Sequence[Fact]) -> str:
    """The facts as prompt/completion rows, one JSON object a line."""
    rows = ({"prompt": fact.question, "completion": fact.answer} for fact in facts)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_shipped_sets(folder: Path) -> None:
    """Write every shipped set into `folder`, as `make reference-model` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, facts in shipped_facts().items():
        (folder / f"{name.removeprefix('shipped:')}.jsonl").write_text(facts_as_jsonl(facts), encoding="utf-8")
