"""A verification in the formats that other programs read: JUnit's XML, SARIF, and the Markdown of a summary.

Source: the JUnit schema of the Jenkins xUnit plugin; OASIS, "Static Analysis Results Interchange Format 2.1.0".
"""

import json
from hashlib import sha256
from typing import Any
from xml.etree import ElementTree

from finetune.records import Outcome
from finetune.verify.catalogue import catalogue
from finetune.verify.results import LawResult, severity_of
from finetune.verify.run import BAD, Verification
from finetune.verify.terminal import counted_outcomes

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"wrong learning": "error", "data loss": "error", "unsafe": "error", "robustness": "warning"}
_MOST_LETTERS = 1024
_MOST_IN_CELL = 300
_MARKUP = frozenset("\\`*_{}[]<>()#|~!&@$")


def junit(found: Verification) -> str:
    """One test case for each law; what is not applicable is skipped with the reason."""
    known = [each for each in found.results if each.law in found.known]
    failed = sum(each.outcome == Outcome.FAILED for each in known)
    counts = found.counts
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"finetune: {found.subject}"),
        tests=str(len(found.results)),
        failures=str(counts[Outcome.FAILED] - failed),
        errors=str(counts[Outcome.ERROR] + counts[Outcome.INCONCLUSIVE] - len(known) + failed + bool(found.trespasses)),
        skipped=str(counts[Outcome.NOT_APPLICABLE] + len(known)),
        time=f"{found.seconds:.3f}",
    )
    for each in found.results:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"finetune.tier{found.tier}", name=each.law, time=f"{each.seconds:.3f}"
        )
        if each.law in found.known:
            ElementTree.SubElement(case, "skipped", message=f"{each.outcome}, as in the baseline")
        elif each.outcome == Outcome.FAILED:
            told = {"type": severity_of(each.law), "message": _clean(each.statement)}
            failure = ElementTree.SubElement(case, "failure", told)
            failure.text = _clean(_evidence(each))
        elif each.outcome in (Outcome.ERROR, Outcome.INCONCLUSIVE):
            ElementTree.SubElement(case, "error", message=each.outcome).text = _clean(each.why)
        elif each.outcome == Outcome.NOT_APPLICABLE:
            ElementTree.SubElement(case, "skipped", message=_clean(each.why))
    if found.trespasses:
        case = ElementTree.SubElement(suite, "testcase", classname="finetune", name="conduct", time="0")
        ElementTree.SubElement(case, "error", message="it did what no subject may").text = _clean(
            "\n".join(found.trespasses)
        )
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def sarif(found: Verification, suite: str, place: str) -> dict[str, Any]:
    """A rule for each law that was judged, and a result for each that does not hold, as code scanning takes them.

    A trainer's fault has no line of a file, and code scanning shows none without one: it is the first of the subject's.

    Args:
        suite: our own version.
        place: the file of the subject, as `subject_file` has it.

    Source: GitHub, "SARIF support for code scanning".
    """
    laws = catalogue()
    rules = [
        {
            "id": each.law,
            "shortDescription": {"text": _short(each.statement, _MOST_LETTERS)},
            "fullDescription": {"text": _short(each.statement, _MOST_LETTERS)},
            "help": {"text": f"Oracle: {laws[each.law].oracle}" if each.law in laws else _clean(each.statement)},
            "defaultConfiguration": {"level": _LEVELS[severity_of(each.law)]},
            "properties": {"tags": [severity_of(each.law)]},
        }
        for each in found.results
        if each.outcome != Outcome.NOT_APPLICABLE
    ]
    where = {"artifactLocation": {"uri": place}, "region": {"startLine": 1}}
    results = [
        {
            "ruleId": each.law,
            "level": _LEVELS[severity_of(each.law)] if each.outcome == Outcome.FAILED else "warning",
            "message": {"text": _clean(f"{found.subject}: {each.outcome}: {each.statement}\n{_evidence(each)}")},
            "locations": [{"physicalLocation": where}],
            # All are of one line: the law tells them apart, from one upload to the next.
            "partialFingerprints": {"primaryLocationLineHash": _fingerprint(found.subject, each.law)},
            **({"baselineState": "unchanged"} if each.law in found.known else {}),
        }
        for each in found.results
        if each.outcome in BAD
    ]
    driver = {
        "name": "FineTune",
        "version": suite,
        "informationUri": "https://github.com/finetune-suite/finetune-suite",
        "rules": rules,
    }
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _fingerprint(subject: str, law: str) -> str:
    return f"{sha256(json.dumps([subject, law]).encode()).hexdigest()[:16]}:1"


def markdown(found: Verification) -> str:
    """A table of what does not hold, for the summary of a job; no word of a trainer's becomes markup."""
    counts = _cell(counted_outcomes(found))
    lines = [
        f"### {'No law fails that is not known' if found.passes else 'Laws fail'}: {_cell(found.subject)}",
        "",
        f"{counts}; tier {found.tier}, seed {found.effort.seed}, {found.seconds:.0f} s",
        "",
    ]
    if rows := [each for each in found.results if each.outcome in BAD]:
        lines += ["| law | severity | outcome | what was seen |", "|---|---|---|---|"]
        for each in rows:
            seen = f"expected {each.expected}, got {each.got}" if each.outcome == Outcome.FAILED else each.why
            statement = f"{_cell(each.statement)}<br>{_cell(seen)}"
            outcome = f"{each.outcome}, known" if each.law in found.known else each.outcome
            lines.append(f"| `{_cell(each.law)}` | {severity_of(each.law)} | {outcome} | {statement} |")
        lines.append("")
    lines += [f"- {_cell(trespass)}" for trespass in found.trespasses]
    if found.gone:
        lines.append(f"- Holds, and did not in the baseline: {', '.join(map(_cell, found.gone))}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Words in one line of a table: what Markdown or HTML would read is written as a number."""
    line = " ".join(_short(_clean(text), _MOST_IN_CELL).split())
    return "".join(letter if letter not in _MARKUP else f"&#{ord(letter)};" for letter in line)


def _short(text: str, most: int) -> str:
    clean = _clean(text)
    return clean if len(clean) <= most else f"{clean[: most - 4]} ..."


def _evidence(result: LawResult) -> str:
    if result.outcome != Outcome.FAILED:
        return result.why
    return f"expected: {result.expected}\ngot: {result.got}\ncase: {result.case}"


def _clean(text: str) -> str:
    return "".join(letter if letter in "\t\n" or letter.isprintable() else "\ufffd" for letter in text)
