"""`ft verify`: hold a trainer to the laws of fine-tuning."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import typer

from finetune.cli.console import data_console, print_data, print_json, say
from finetune.cli.options import AsJson, require_hypothesis
from finetune.errors import FineTuneError, MissingExtraError
from finetune.processes import terminated_as_interrupted

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from finetune.verify.judge import Effort
    from finetune.verify.results import LawResult
    from finetune.verify.run import Verification

SubjectName = Annotated[
    str | None,
    typer.Option(
        "--subject",
        help="reference, torch or mlx (ours), trl, mlx-lm, trainer, a subject's TOML file, or module:Class. "
        "Default: torch where it is installed, else reference.",
    ),
]
TierNumber = Annotated[int, typer.Option("--tier", min=1, max=2, help="1: laws of milliseconds; 2: training, too.")]
Profile = Annotated[str, typer.Option("--profile", help="fast, ci, slow or thorough: 1, 4, 40 or 200 times the cases.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed for case generation; equal seeds give equal cases.")]
LawNames = Annotated[list[str] | None, typer.Option("--law", metavar="ID", help="Only this law; can be repeated.")]
Excluded = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="ID", help="All laws but this; can be repeated.")
]
KnownFile = Annotated[
    Path | None,
    typer.Option("--baseline", metavar="FILE", help="What --json printed before: what failed then fails nothing now."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every law, not only what does not hold.")]
Python = Annotated[str | None, typer.Option("--python", help="The interpreter in which another trainer is installed.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="A folder for findings: a file to replay and a report for each.")
]
JUnit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")]
Sarif = Annotated[Path | None, typer.Option("--sarif", metavar="FILE", help="Write SARIF.")]
Summary = Annotated[Path | None, typer.Option("--summary", metavar="FILE", help="Write a table in Markdown.")]
List = Annotated[bool, typer.Option("--list", help="Only name the laws.")]
TIMES = {"fast": 1.0, "ci": 4.0, "slow": 40.0, "thorough": 200.0}


class Places(NamedTuple):
    """Where what was found is written, where it is."""

    output: Path | None
    junit: Path | None
    sarif: Path | None
    summary: Path | None


def command(
    *,
    subject: SubjectName = None,
    tier: TierNumber = 1,
    profile: Profile = "fast",
    seed: Seed = 0,
    law: LawNames = None,
    exclude: Excluded = None,
    baseline: KnownFile = None,
    python: Python = None,
    output: Output = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    summary: Summary = None,
    list_laws: List = False,
    verbose: Verbose = False,
    json_output: AsJson = False,
) -> int:
    """Run the conformance suite on a trainer, ours or anybody's; what fails is told by its smallest case.

    Exits with 0 when every law that applies passes, and with 1 when one fails, could not be judged, or none was.
    """
    require_hypothesis("ft verify")
    from finetune.verify.known import read_known
    from finetune.verify.run import chosen_laws, judge_conduct

    laws = chosen_laws(tier, law or (), exclude or ())
    if list_laws:
        if json_output:
            told = [(each.id, each.statement, each.tier, each.severity) for each in laws]
            print_json([dict(zip(("law", "statement", "tier", "severity"), each, strict=True)) for each in told])
        else:
            print_data("\n".join(f"{each.id} ({each.severity}): {each.statement}" for each in laws))
        return 0
    known = read_known(baseline) if baseline is not None else None
    subject, effort = subject or _ours(), _effort(profile, seed)
    _make_room(output, junit, sarif, summary)
    with terminated_as_interrupted(), _Watch(len(laws), verbose=verbose) as watch:
        conduct = () if law else judge_conduct(subject, python=python, tell=watch)
        kept = [each for each in conduct if each.law not in (exclude or ())]
        found = _verified(subject, laws, effort, tier=tier, python=python, tell=watch.counted).after(kept)
    if known is not None and known.subject == found.subject:
        found = found.held_to(known.outcomes)
    elif known is not None:
        say(
            f"note: {baseline} is of {known.subject!r}, and {found.subject!r} was judged: nothing in it counts as known"
        )
    options = f"--subject {shlex.quote(subject)}" + (f" --python {shlex.quote(python)}" if python else "")
    _write(found, subject, options, Places(output, junit, sarif, summary))
    if json_output:
        print_json(found.as_dict())
    else:
        _print(found, options, verbose=verbose)
    return 0 if found.passes else 1


class _Watch:
    """Shows laws while they are judged: a bar on a terminal, and above it, or without one, what does not hold."""

    def __init__(self, laws: int, *, verbose: bool) -> None:
        self._laws, self._verbose = laws, verbose
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
            law = TextColumn("{task.description}", markup=False)
            self._bar = RichProgress(*columns, law, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._laws)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, result: "LawResult") -> None:
        """Tell of one law."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=result.law)
        holds = result.outcome in ("passed", "not applicable")
        if holds and not self._verbose:
            return
        why = f": {result.why}" if result.why and result.outcome != "passed" else ""
        line = f"{result.law}: {result.outcome}{why}"
        if self._bar is None:
            say(line)
        else:
            self._bar.console.print(line, markup=False, highlight=False)

    def counted(self, result: "LawResult") -> None:
        """Tell of one of the laws of the bar."""
        self(result)
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)


def _make_room(output: Path | None, *files: Path | None) -> None:
    """Refuse now what could not be written in the end."""
    from finetune.errors import OutputError
    from finetune.files import make_folder

    for file in filter(None, files):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise OutputError(f"{file} cannot be written: it is a folder, or lies in none", hint="name a file")
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is not a directory", hint="name a new folder, or one of an earlier run")
    make_folder(output)


def _ours() -> str:
    """Our own trainer with the best that is installed here."""
    from finetune.abilities import require_backend

    try:
        require_backend("torch")
    except MissingExtraError as missing:
        say(f"judging our reference backend: {missing.message}")
        return "reference"
    return "torch"


def _effort(profile: str, seed: int) -> "Effort":
    from finetune.errors import UsageError
    from finetune.verify.judge import Effort

    if profile not in TIMES:
        raise UsageError(f"there is no profile {profile!r}", hint=f"choose one of: {', '.join(TIMES)}")
    times = TIMES[profile]
    return Effort(seed=seed, times=times, seconds=60 * times, shrink_seconds=30 * times**0.5)


def _verified(subject: str, laws: Any, effort: "Effort", **how: Any) -> "Verification":
    from finetune.verify.run import verify_subject
    from finetune.verify.subjects.subject import SubjectError

    try:
        return verify_subject(subject, laws, effort, **how)
    except SubjectError as error:
        raise FineTuneError(f"the subject {subject!r} cannot be asked: {error}") from None


def _write(found: "Verification", subject: str, options: str, places: Places) -> None:
    from importlib.metadata import version

    from finetune.files import write_output, write_text
    from finetune.verify import formats
    from finetune.verify.findings import as_document, earlier_findings, tell_report, write_findings
    from finetune.verify.subjects.choose import subject_file

    suite = version("finetune-suite")
    if places.output is not None:
        paths = write_findings(found, subject, places.output)
        for path in paths:
            [result] = [each for each in found.results if each.law == path.stem]
            again = f"ft replay {shlex.quote(str(path))} {options}"
            write_text(path.with_suffix(".md"), tell_report(found, result, again))
        write_text(places.output / "verification.json", as_document(found.as_dict()))
        if earlier := earlier_findings(places.output, paths):
            names = ", ".join(path.name for path in earlier)
            say(f"{places.output} keeps findings of an earlier run, which are none of this one: {names}")
    if places.junit is not None:
        write_output(places.junit, formats.junit(found))
    if places.sarif is not None:
        write_output(places.sarif, as_document(formats.sarif(found, suite, subject_file(subject))))
    if places.summary is not None:
        write_output(places.summary, formats.markdown(found))


def _print(found: "Verification", options: str, *, verbose: bool) -> None:
    from finetune.verify.terminal import tell_verification

    tell_verification(found, data_console(), verbose=verbose)
    if not found.passes:
        again = f"ft verify {options} --tier {found.tier} --seed {found.effort.seed} (and options as now)"
        say(f"reproduce with: {again}; --output FOLDER keeps each smallest case for ft replay")
