"""Findings: the smallest case in which a trainer broke a law, in a file that anybody can try again, and in words."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune.errors import UsageError
from finetune.files import meant_file, write_text
from finetune.reading import read_json, read_text
from finetune.records import Outcome
from finetune.verify.catalogue import Law, catalogue
from finetune.verify.results import LawResult, severity_of
from finetune.verify.run import Verification
from finetune.verify.stateful.story import RunStory, StoreStory
from finetune_strategies.recipes import Recipe

FORMAT = "finetune finding"
VERSION = 2
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
    seed: int | str = 0
    case: dict[str, Any]
    stage: Annotated[int, Field(ge=0)] = 0
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A law, the case in which a subject failed it, and what was seen.

    The case of a stateful law is a story; `stage` is the one at which it failed, counted from 1.
    """

    law: Law
    case: Recipe
    subject: str
    expected: str
    got: str
    stage: int = 0
    seed: int | str = 0
    versions: Mapping[str, str] = field(default_factory=dict)


def write_finding(finding: Finding, path: Path) -> None:
    """Write a finding to a file, whole or not at all; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = _Written(
        format=FORMAT,
        version=VERSION,
        law=finding.law.id,
        statement=finding.law.statement,
        subject=finding.subject,
        versions=dict(finding.versions),
        suite=version("finetune-suite"),
        seed=finding.seed,
        case=finding.case.model_dump(mode="json"),
        stage=finding.stage,
        expected=finding.expected,
        got=finding.got,
    )
    write_text(path, as_document(written.model_dump()))


def write_findings(found: Verification, asked_as: str, folder: Path) -> list[Path]:
    """Write a file for each law that failed, named by the law; those that were there are written anew.

    Args:
        asked_as: the name by which the subject was chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    laws, paths = catalogue(), []
    for each in found.results:
        if each.outcome == Outcome.FAILED and each.case is not None:
            law = laws[each.law]
            case = _case(law, each.case)
            seed = found.effort.seed
            finding = Finding(law, case, asked_as, each.expected, each.got, seed=seed, versions=found.versions)
            paths.append(folder / f"{each.law}.json")
            write_finding(finding, paths[-1])
    return paths


def _case(law: Law, values: Mapping[str, object]) -> Recipe:
    """A case from its JSON values: a story where there is a scene.

    Raises:
        ValidationError: it is no case of this law; all that is wrong is told at once.
        UsageError: the law has no such cases.
    """
    scenes: Mapping[str, type[Recipe]] = {"training": RunStory, "checkpoints": StoreStory}
    kind = scenes.get(str(values.get("scene")), law.kind) if law.scene or "scene" not in values else None
    if kind is None:
        raise UsageError(f"the law {law.id!r} has no such cases", hint="`ft verify --list` has the laws")
    return kind.model_validate_json(json.dumps(values))


def earlier_findings(folder: Path, written: Collection[Path]) -> list[Path]:
    """The findings in a folder beside those that were written just now."""
    return [path for path in sorted(folder.glob("*.json")) if path not in written and is_finding(path)]


def is_finding(path: Path) -> bool:
    """Whether a file says that it is a finding; whether it is a good one is for `load_finding` to say."""
    try:
        values = read_json(path, MOST_BYTES)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def load_finding(path: Path) -> Finding:
    """The finding in a file.

    Raises:
        UsageError: it is none that this version can try again; all that is wrong is told at once.
    """
    hint = "find it again with ft verify, or with the test that wrote it"
    try:
        written = _Written.model_validate_json(read_text(path, MOST_BYTES))
        if written.format != FORMAT:
            raise UsageError(f"{path} is no finding: its format is {written.format!r}, not {FORMAT!r}", hint=hint)
        if written.version != VERSION:
            raise UsageError(f"{path}: version {written.version}; this program reads version {VERSION}")
        law = catalogue().get(written.law)
        if law is None:
            raise UsageError(f"{path}: there is no law {written.law!r}", hint="`ft verify --list` has them")
        case = _case(law, written.case)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", hint=meant_file(path, "name the JSON file of a finding")
        ) from None
    except ValidationError as error:
        told = "it is no JSON" if error.errors()[0]["type"] == "json_invalid" else f"\n{_wrong(error)}"
        raise UsageError(f"{path} is no finding: {told}".replace(": \n", ":\n"), hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no finding: {error}", hint=hint) from None
    stages = getattr(case, "stages", ())
    if written.stage > len(stages):
        raise UsageError(f"{path} is no finding: stage {written.stage} of {len(stages)} stages", hint=hint)
    return Finding(
        law, case, written.subject, written.expected, written.got, written.stage, written.seed, written.versions
    )


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


def tell_report(found: Verification, result: LawResult, replay: str) -> str:
    """A finding in Markdown, ready to be filed where the trainer is made."""
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    case = json.dumps(result.case, indent=1, ensure_ascii=False)
    lines = [
        f"### {result.statement}",
        "",
        f"Seen with {found.subject} ({versions}) on {found.machine}.",
        f"Law `{result.law}` ({severity_of(result.law)}), seed {found.effort.seed}.",
        "",
        *_block("Expected:", "text", result.expected),
        *_block("Got:", "text", result.got),
        *_block("The smallest case that was found:", "json", case),
        f"Once more: `{replay}`",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "replace").decode()


def _block(title: str, kind: str, text: str) -> list[str]:
    """A block of Markdown between more backticks than the text has in a row, so that it cannot end it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [title, "", f"{fence}{kind}", text, fence, ""]


def as_document(values: Mapping[str, object]) -> str:
    """JSON as it is written to files; halves of letters, which a trainer may say, are written as JSON escapes them."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
