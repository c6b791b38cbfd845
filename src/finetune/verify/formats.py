"""A verification in the formats that other programs read: JUnit's XML, and SARIF.

Source: the JUnit schema of the Jenkins xUnit plugin; OASIS, "Static Analysis Results Interchange Format 2.1.0".
"""

from typing import Any
from xml.etree import ElementTree

from finetune.records import Outcome
from finetune.verify.catalogue import catalogue
from finetune.verify.results import LawResult
from finetune.verify.run import Verification

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_BAD = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)


def junit(found: Verification) -> str:
    """One test case for each law; what is not applicable is skipped with the reason."""
    counts = found.counts
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"finetune: {found.subject}"),
        tests=str(len(found.results)),
        failures=str(counts[Outcome.FAILED]),
        errors=str(counts[Outcome.ERROR] + counts[Outcome.INCONCLUSIVE] + bool(found.trespasses)),
        skipped=str(counts[Outcome.NOT_APPLICABLE]),
        time=f"{found.seconds:.3f}",
    )
    for each in found.results:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"finetune.tier{found.tier}", name=each.law, time=f"{each.seconds:.3f}"
        )
        if each.outcome == Outcome.FAILED:
            failure = ElementTree.SubElement(case, "failure", message=_clean(each.statement))
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


def sarif(found: Verification, suite: str) -> dict[str, Any]:
    """A rule for each law that was judged, and a result for each that does not hold; `suite` is our own version."""
    laws = catalogue()
    rules = [
        {
            "id": each.law,
            "shortDescription": {"text": each.statement},
            "help": {"text": f"Oracle: {laws[each.law].oracle}" if each.law in laws else each.statement},
        }
        for each in found.results
        if each.outcome != Outcome.NOT_APPLICABLE
    ]
    results = [
        {
            "ruleId": each.law,
            "level": laws[each.law].severity if each.outcome == Outcome.FAILED else "warning",
            "message": {"text": f"{found.subject}: {each.outcome}: {each.statement}\n{_evidence(each)}"},
            # A trainer's fault has no line of a file that could be named; code scanning wants a place all the same.
            "locations": [{"logicalLocations": [{"fullyQualifiedName": found.subject, "kind": "module"}]}],
            "partialFingerprints": {"law": each.law, "subject": found.subject},
        }
        for each in found.results
        if each.outcome in _BAD
    ]
    driver = {
        "name": "FineTune",
        "version": suite,
        "informationUri": "https://github.com/finetune-suite/finetune-suite",
        "rules": rules,
    }
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _evidence(result: LawResult) -> str:
    if result.outcome != Outcome.FAILED:
        return result.why
    return f"expected: {result.expected}\ngot: {result.got}\ncase: {result.case}"


def _clean(text: str) -> str:
    return "".join(letter if letter in "\t\n" or letter.isprintable() else "\ufffd" for letter in text)
