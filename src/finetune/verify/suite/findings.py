"""Findings: the smallest case in which a trainer broke a law, in a file that anybody can try again, and in words."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from finetune.errors import UsageError
from finetune.files import write_text
from finetune.verify.recipes import Recipe
from finetune.verify.suite.catalogue import CaseLaw, case_laws
from finetune.verify.suite.run import Verification
from finetune.verify.suite.verdicts import LawResult

FORMAT = "finetune finding"
VERSION = 1
MOST_BYTES = 1_000_000
MOST_QUOTED = 200


class _Written(Recipe):
    """What a file of a finding holds."""

    format: str
    version: int
    law: str
    statement: str
    subject: str
    versions: dict[str, str] = Field(default_factory=dict)
    suite: str = ""
    seed: int = 0
    case: dict[str, Any]
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A law, the case in which somebody broke it, and what was seen."""

    law: CaseLaw
    case: Recipe
    subject: str
    expected: str
    got: str


def write_findings(found: Verification, asked_as: str, folder: Path, suite: str) -> list[Path]:
    """Write a file for each law that is broken, named by the law; those that were there are written anew.

    Args:
        asked_as: the name by which the subject was chosen.
        suite: the suite's own version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for each in found.judgements:
        if each.word != "broken" or each.case is None:
            continue
        values = {
            "format": FORMAT,
            "version": VERSION,
            "law": each.law,
            "statement": each.statement,
            "subject": asked_as,
            "versions": dict(found.versions),
            "suite": suite,
            "seed": found.effort.seed,
            "case": each.case,
            "expected": each.expected,
            "got": each.got,
        }
        path = folder / f"{each.law}.json"
        write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths


def earlier_findings(folder: Path, written: Collection[Path]) -> list[Path]:
    """The findings in a folder beside those that were written just now."""
    return [path for path in sorted(folder.glob("*.json")) if path not in written and is_finding(path)]


def is_finding(path: Path) -> bool:
    """Whether a file says that it is a finding; whether it is a good one is for `load_finding` to say."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def load_finding(path: Path) -> Finding:
    """The finding in a file.

    Raises:
        UsageError: it is none that this version can try again; all that is wrong is told at once.
    """
    text = path.read_text(encoding="utf-8")
    try:
        written = _Written.model_validate_json(text)
        if written.version != VERSION:
            raise UsageError(f"{path}: version {written.version}; this program reads version {VERSION}")
        law = case_laws().get(written.law)
        if law is None:
            raise UsageError(f"{path}: there is no law {written.law!r}", hint="`ft verify --list` has them")
        case = law.kind.model_validate_json(json.dumps(written.case))
    except ValidationError as error:
        raise UsageError(f"{path} is no finding:\n{_wrong(error)}", hint="find it again with ft verify") from None
    return Finding(law, case, written.subject, written.expected, written.got)


def _wrong(error: ValidationError) -> str:
    """Each place that is wrong, why, and what is there, in letters that move no terminal."""
    inside = "" if error.title == _Written.__name__ else "case."
    lines = []
    for each in error.errors(include_url=False):
        there = "" if each["type"] == "missing" else f"; it is {json.dumps(each['input'], default=repr)[:MOST_QUOTED]}"
        lines.append(f"  {inside}{'.'.join(map(_plain, each['loc']))}: {_plain(each['msg'])}{there}")
    return "\n".join(lines)


def _plain(word: object) -> str:
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in str(word))


def tell_report(found: Verification, judgement: LawResult, replay: str) -> str:
    """A finding in Markdown, ready to be filed where the trainer is made."""
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    case = json.dumps(judgement.case, indent=1, ensure_ascii=False)
    lines = [
        f"### {judgement.statement}",
        "",
        f"Seen with {found.subject} ({versions}) on {found.machine}.",
        f"Law `{judgement.law}`, seed {found.effort.seed}.",
        "",
        *_block("Expected:", "text", judgement.expected),
        *_block("Got:", "text", judgement.got),
        *_block("The smallest case that was found:", "json", case),
        f"Once more: `{replay}`",
        "",
    ]
    return "\n".join(lines)


def _block(title: str, kind: str, text: str) -> list[str]:
    """A block of Markdown between more backticks than the text has in a row, so that it cannot end it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [title, "", f"{fence}{kind}", text, fence, ""]


def as_document(values: Mapping[str, Any]) -> str:
    """JSON as it is written to files."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
