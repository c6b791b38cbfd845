"""`ft replay`: try a finding again."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import print_data, print_json
from finetune.cli.options import AsJson, require_hypothesis
from finetune.errors import RefusedError, UsageError
from finetune.processes import terminated_as_interrupted

FileName = Annotated[
    Path, typer.Argument(metavar="FILE", help="A finding, as ft verify or a failing state machine writes it.")
]
SubjectName = Annotated[str | None, typer.Option("--subject", help="As for ft verify. Default: the file's own.")]
Python = Annotated[str | None, typer.Option("--python", help="As for ft verify.")]
_CODES = {"passed": 0, "failed": 1, "error": 4, "inconclusive": 4}


def command(file: FileName, *, subject: SubjectName = None, python: Python = None, json_output: AsJson = False) -> int:
    """Try a finding again: its law passes now, fails again, or cannot be judged.

    Exits with 0 when it passed, 1 when it failed, 2 when the file is no finding, 3 when the subject lacks an ability
    that is needed, and 4 when something else was in the way, so that no law was judged.
    """
    require_hypothesis("ft replay")
    from finetune.verify.findings import load_finding
    from finetune.verify.replay import replay
    from finetune.verify.results import severity_of
    from finetune.verify.subjects.choose import is_shipped

    finding = load_finding(file)
    name = subject or finding.subject
    if subject is None and not is_shipped(name):
        raise UsageError(
            f"the finding is about {name!r}, and no file decides what is run here",
            hint=f"--subject {name} tries it on that one, --subject reference on ours",
        )
    with terminated_as_interrupted():
        found = replay(finding, name, python=python)
    if found.outcome == "not applicable":
        raise RefusedError(f"not applicable: {found.why}", hint="try it on a subject that has it: --subject")
    if json_output:
        print_json({"subject": name, **found.as_dict()})
        return _CODES[found.outcome]
    lines = [f"{found.outcome}: {name}", f"  law: {found.law} ({severity_of(found.law)}): {found.statement}"]
    if found.outcome == "failed":
        lines += [f"  expected: {found.expected}", f"  got: {found.got}"]
    elif found.why:
        lines.append(f"  {found.why}")
    print_data("\n".join([*lines, *(f"  {note}" for note in found.notes)]))
    return _CODES[found.outcome]
