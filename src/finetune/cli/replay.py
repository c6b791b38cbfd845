"""`ft replay`: tell a failing story once more."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import print_data, print_json, say
from finetune.cli.options import AsJson
from finetune.errors import RefusedError, UsageError
from finetune.processes import terminated_as_interrupted

if TYPE_CHECKING:
    from finetune.verify.minimise import Minimised
    from finetune.verify.stories import Story
    from finetune.verify.theatre import StoryResult

FileName = Annotated[
    Path, typer.Argument(metavar="FILE", help="A finding of ft verify, or a story as a failing machine writes it.")
]
SubjectName = Annotated[
    str | None,
    typer.Option("--subject", help="As for ft verify; of a story ours or module:Class. Default: the file's own."),
]
Python = Annotated[str | None, typer.Option("--python", help="As for ft verify.")]
Minimise = Annotated[bool, typer.Option("--minimise", help="Make a story that breaks smaller, in FILE.min.json.")]
Seconds = Annotated[float, typer.Option("--seconds", min=1, help="How long it may be made smaller.")]
_ERROR = 4
_WORDS = {"kept": "FIXED", "broken": "BROKEN", "error": "ERROR"}
_CODES = {"kept": 0, "broken": 1, "error": _ERROR}


def command(
    file: FileName,
    *,
    subject: SubjectName = None,
    python: Python = None,
    minimise: Minimise = False,
    seconds: Seconds = 300,
    json_output: AsJson = False,
) -> int:
    """Try a failure again: FIXED when every law of it holds, BROKEN when one does not, else ERROR.

    Exits with 0 when FIXED, 1 when BROKEN, 2 when the file is no failure, 3 when the subject lacks an ability that is
    needed, and 4 on ERROR: then something else was in the way, and no law was judged.
    """
    from finetune.cli.replay_finding import replay_finding, tells_finding

    if tells_finding(file):
        if minimise:
            raise UsageError(f"{file} is a finding, which is as small as it gets", hint="--minimise is for stories")
        return replay_finding(file, subject, python, as_json=json_output)
    from finetune.verify.choose import BACKENDS, opened_subject
    from finetune.verify.confine import confined_to
    from finetune.verify.stories import load_story
    from finetune.verify.theatre import ScenarioRunner

    if python:
        raise UsageError(f"--python {python}: {file} is a story, told in this environment", hint="leave --python out")
    story = load_story(file)
    name = subject or story.origin.subject
    if subject is None and name not in BACKENDS:
        raise UsageError(
            f"the story was told to {name!r}, and no file decides what is imported here",
            hint=f"--subject {name} tells it to that one, --subject reference to ours",
        )
    with terminated_as_interrupted(), opened_subject(name) as chosen:
        theatre = ScenarioRunner(chosen)
        try:
            with confined_to(theatre.folder, name):
                outcome = theatre.run(story)
            smaller = _smaller(theatre, story, outcome, file, seconds) if minimise else None
        finally:
            theatre.close()
    if outcome.verdict == "not applicable":
        raise RefusedError(f"not applicable: {outcome.why}", hint="tell it to a subject that has it: --subject")
    if json_output:
        print_json(_as_dict(name, story, outcome, smaller))
    else:
        _tell(name, story, outcome)
    return _CODES[outcome.verdict]


def _smaller(theatre: Any, story: "Story", outcome: "StoryResult", file: Path, seconds: float) -> "Minimised | None":
    """The story made smaller and written next to its file; None where there is nothing to make smaller."""
    from finetune.verify.minimise import minimise, same_break
    from finetune.verify.stories import save_story

    if outcome.finding is None:
        say("nothing to make smaller: no law broke")
        return None
    broken = story.model_copy(update={"broken": outcome.finding})
    found = minimise(broken, lambda each: same_break(broken, each, theatre.run(each)), seconds=seconds)
    path = file.with_suffix(".min.json")
    save_story(found.story, path)
    ended = "nothing smaller breaks so" if found.finished else "time was over before all had been tried"
    say(f"tried {found.tried} smaller stories; {ended}; the smallest: ft replay {path}")
    return found


def _tell(name: str, story: "Story", outcome: "StoryResult") -> None:
    lines = [f"{_WORDS[outcome.verdict]}: {name}"]
    if outcome.why:
        lines.append(f"  {outcome.why}")
    finding = outcome.finding
    if finding is not None:
        stage = story.stage_of(finding) or "a run that nothing disturbs"
        lines += [f"  law: {finding.law}: {finding.statement}"]
        if story.broken is not None and story.broken.law != finding.law:
            lines.append(f"  another law than the story tells of: {story.broken.law}")
        lines += [f"  stage {finding.stage}: {stage}", f"  expected: {finding.expected}", f"  got: {finding.got}"]
    if outcome.idle:
        lines.append(f"  stages that found nothing to act on: {', '.join(map(str, outcome.idle))}")
    if outcome.late:
        lines.append(f"  stages whose death never came: {', '.join(map(str, outcome.late))}")
    print_data("\n".join(lines))


def _as_dict(name: str, story: "Story", outcome: "StoryResult", smaller: "Minimised | None") -> dict[str, Any]:
    finding = outcome.finding
    return {
        "outcome": _WORDS[outcome.verdict],
        "subject": name,
        "law": finding.model_dump() if finding else None,
        "told of": story.broken.model_dump() if story.broken else None,
        "why": outcome.why,
        "idle": list(outcome.idle),
        "late": list(outcome.late),
        "deaths": dict(outcome.died),
        "minimised": {"tried": smaller.tried, "finished": smaller.finished} if smaller else None,
    }
