"""What a verification came to, as a terminal shows it: what does not hold, counts with reasons, and no more unasked."""

import json
from collections import Counter
from typing import TYPE_CHECKING

from finetune.records import Outcome
from finetune.verify.catalogue import catalogue
from finetune.verify.results import SEVERITIES, LawResult, severity_of
from finetune.verify.run import BAD, Verification

if TYPE_CHECKING:
    from rich.console import Console

_MOST_OF_CASE = 600
_COLOURS = {Outcome.FAILED: "bold red", Outcome.ERROR: "bold yellow", Outcome.INCONCLUSIVE: "bold yellow"}
_ORDER = list(SEVERITIES)


def tell_verification(found: Verification, console: "Console", *, verbose: bool) -> None:
    """Print it: worst first, the counts last; `verbose` has a table of all laws before that."""
    from rich.table import Table
    from rich.text import Text

    if verbose:
        table = Table("law", "severity", "outcome", "cases", "seconds", "why", box=None)
        for each in found.results:
            why = each.why if each.outcome != Outcome.PASSED else ""
            table.add_row(
                each.law, severity_of(each.law), each.outcome, str(each.cases), f"{each.seconds:.1f}", Text(why)
            )
        console.print(table)
    bad = [each for each in found.results if each.outcome in BAD and (verbose or each.law not in found.known)]
    for each in sorted(bad, key=lambda each: _ORDER.index(severity_of(each.law))):
        head = Text(each.outcome.upper(), style=_COLOURS[each.outcome])
        for line in (head.append(f" {each.law}", style="bold").append(told_law(each), style="not bold"), *_told(each)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    lines = [f"TRESPASS: {trespass}" for trespass in found.trespasses]
    if found.known:
        lines.append(f"known from the baseline: {', '.join(found.known)}")
    if found.gone:
        lines.append(f"holds now, and did not in the baseline: {', '.join(found.gone)}")
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    end = f"seed {found.effort.seed}, {found.seconds:.0f} s"
    lines.append(f"{found.subject} ({versions}): {counted_outcomes(found)}; {end}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def told_law(result: LawResult) -> str:
    """What stands behind a law's id: what its failure means, and its sentence."""
    return f" ({severity_of(result.law)}): {result.statement}"


def _told(result: LawResult) -> list[str]:
    """The evidence, in lines that are indented; a case that is long is cut, and whole in the finding's file."""
    if result.outcome != Outcome.FAILED:
        return [f"  {line}" for line in result.why.encode("utf-8", "replace").decode().splitlines()]
    lines = []
    for word, text in (("expected", result.expected), ("got", result.got)):
        first, *more = text.splitlines() or [""]
        lines += [f"  {word}: {first}", *(f"    {line}" for line in more)]
    if result.case is not None:
        case = json.dumps(result.case, ensure_ascii=False)
        left = len(case) - _MOST_OF_CASE
        shown = case if left <= 0 else f"{case[:_MOST_OF_CASE]} ... and {left:,} letters: --output keeps it whole"
        lines.append(f"  smallest case: {shown}")
    lines += [f"  {result.why}"] if result.why else []
    return [line.encode("utf-8", "replace").decode() for line in lines]


def counted_outcomes(found: Verification) -> str:
    """How many laws came to what; of those that were skipped, what was missing."""
    counts, known = found.counts, len(found.known)
    skipped = Counter(_missing(each) for each in found.results if each.outcome == Outcome.NOT_APPLICABLE)
    failed = Counter(severity_of(each.law) for each in found.results if each.outcome == Outcome.FAILED)
    told = [f"{counts[Outcome.PASSED]} passed"] if counts[Outcome.PASSED] else []
    if failed:
        means = ", ".join(f"{failed[severity]} {severity}" for severity in _ORDER if failed[severity])
        told.append(f"{failed.total()} failed ({means})")
    told += [f"{count} error{'s' * (count > 1)}"] if (count := counts[Outcome.ERROR]) else []
    told += [f"{count} inconclusive"] if (count := counts[Outcome.INCONCLUSIVE]) else []
    told += [f"{known} of these known"] if known else []
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        told.append(f"{skipped.total()} skipped ({reasons})")
    return ", ".join(told) or "no law was judged"


def _missing(result: LawResult) -> str:
    """The first ability that a law needs and the subject lacks; without one, cases are what it has nothing for."""
    law = catalogue().get(result.law)
    lacking = [part.partition(":")[0] for part in result.why.split("; ")]
    missing = next((ability for ability in lacking if law is not None and ability in law.needs), "")
    return f"no `{missing}`" if missing else "no case that it takes"
