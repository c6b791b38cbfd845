"""Tries a finding again: its law, on its very case."""

import tempfile
from pathlib import Path

from finetune.records import Outcome
from finetune.verify.catalogue import catalogue
from finetune.verify.confine import confined_to
from finetune.verify.findings import Finding
from finetune.verify.results import LawResult
from finetune.verify.run import judge_subject_again
from finetune.verify.stateful.runner import ScenarioRunner
from finetune.verify.stateful.story import RunStory, StoreStory, Story
from finetune.verify.subjects.choose import running_subject


def replay(finding: Finding, subject: str, *, python: str | None = None) -> LawResult:
    """Hold a subject, opened by its name, to the law of a finding in its case.

    Raises:
        UsageError, MissingExtraError: there is no such subject, or it is not installed.
    """
    if not isinstance(finding.case, RunStory | StoreStory):
        return judge_subject_again(subject, finding.law, finding.case, python=python)
    with (
        tempfile.TemporaryDirectory(prefix="finetune-replay-") as place,
        running_subject(subject, Path(place), python=python) as opened,
    ):
        runner = ScenarioRunner(opened)
        try:
            with confined_to(runner.folder, subject):
                return _replayed(runner, finding, finding.case)
        finally:
            runner.close()


def _replayed(runner: ScenarioRunner, finding: Finding, story: Story) -> LawResult:
    """A story, told once more; a law of it may fail that is not the finding's."""
    found = runner.run(story, point=finding.stage)
    notes = []
    if found.idle:
        notes.append(f"stages that found nothing to act on: {', '.join(map(str, found.idle))}")
    if found.late:
        notes.append(f"stages whose death never came: {', '.join(map(str, found.late))}")
    failure = found.failure
    if failure is None:
        law = finding.law
        return LawResult(law.id, law.statement, found.outcome, cases=1, why=found.why, notes=tuple(notes))
    law = catalogue()[failure.law]
    if law.id != finding.law.id:
        notes.insert(0, f"another law than the finding's: {finding.law.id}")
    stage = story.stages[found.stage - 1].do if found.stage else "a run that nothing disturbs"
    notes.insert(0, f"stage {found.stage}: {stage}")
    expected, got = runner.plain(failure.expected), runner.plain(failure.got)
    return LawResult(
        law.id,
        law.statement,
        Outcome.FAILED,
        cases=1,
        expected=expected,
        got=got,
        case=story.model_dump(mode="json"),
        notes=tuple(notes),
    )
