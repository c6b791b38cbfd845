"""`ft replay` of a finding: one law, one case, once more."""

from pathlib import Path

from finetune.cli.console import print_data, print_json
from finetune.errors import RefusedError, UsageError
from finetune.processes import terminated_as_interrupted

_CODES = {"holds": 0, "broken": 1, "error": 4, "undecided": 4}
_WORDS = {"holds": "FIXED", "broken": "BROKEN", "error": "ERROR", "undecided": "ERROR"}


def tells_finding(file: Path) -> bool:
    """Whether a file is a finding of `ft verify`, and no story."""
    from finetune.verify.suite.findings import is_finding

    return is_finding(file)


def replay_finding(file: Path, subject: str | None, python: str | None, *, as_json: bool) -> int:
    """Hold a subject to the law in the very case in which it was broken."""
    from finetune.verify.suite.findings import load_finding
    from finetune.verify.suite.run import judge_subject_again
    from finetune.verify.suite.subjects import is_shipped

    finding = load_finding(file)
    name = subject or finding.subject
    if subject is None and not is_shipped(name):
        raise UsageError(
            f"the finding is about {name!r}, and no file decides what is run here",
            hint=f"--subject {name} tries it on that one, --subject reference on ours",
        )
    with terminated_as_interrupted():
        found = judge_subject_again(name, finding.law, finding.case, python=python)
    if found.word == "not applicable":
        raise RefusedError(f"not applicable: {found.why}", hint="try it on a subject that has it: --subject")
    if as_json:
        print_json({"outcome": _WORDS[found.word], "subject": name, **found.as_dict()})
        return _CODES[found.word]
    lines = [f"{_WORDS[found.word]}: {name}", f"  law: {found.law}: {found.statement}"]
    if found.word == "broken":
        lines += [f"  expected: {found.expected}", f"  got: {found.got}"]
    elif found.why:
        lines.append(f"  {found.why}")
    print_data("\n".join(lines))
    return _CODES[found.word]
