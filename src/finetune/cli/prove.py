"""`ft prove`: plant faults in our own trainer, and count what the suite kills."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.console import data_console, print_data, print_json, say
from finetune.cli.options import AsJson, require_hypothesis
from finetune.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.verify.faults.fault import Fault
    from finetune.verify.prove.campaign import Proof

TierNumber = Annotated[int, typer.Option("--tier", min=1, max=2, help="The laws of this tier and those below it.")]
FaultNames = Annotated[
    list[str] | None, typer.Option("--fault", metavar="ID", help="Only this fault, by id or name; can be repeated.")
]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Faults at once. Default: one a processor.")]
EngineName = Annotated[str, typer.Option("--engine", help="processes here, or ray: over a Ray cluster.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Clean runs, each with a seed of its own.")]
AllLaws = Annotated[
    bool, typer.Option("--all-laws", help="Ask every law of every fault, and not only until one has killed it.")
]
BackendName = Annotated[str, typer.Option("--backend", help="Plant in this backend: reference, torch or mlx.")]
Times = Annotated[float, typer.Option("--times", min=0.01, help="So many times the cases of profile fast.")]
Against = Annotated[
    Path | None,
    typer.Option("--against", help="A kill-matrix.json: fail where a law kills a fault no more. Asks every law."),
]
Output = Annotated[
    Path, typer.Option("--output", help="A folder for proof.json and proof.html; a campaign goes on where it stopped.")
]
List = Annotated[bool, typer.Option("--list", help="Only name the faults.")]


def command(
    *,
    tier: TierNumber = 1,
    fault: FaultNames = None,
    backend: BackendName = "reference",
    jobs: Jobs = None,
    engine: EngineName = "processes",
    seeds: Seeds = 20,
    all_laws: AllLaws = False,
    times: Times = 1.0,
    against: Against = None,
    output: Output = Path("proof"),
    list_faults: List = False,
    json_output: AsJson = False,
) -> int:
    """Inject known bugs into our own trainer, each in its own process, and count which are caught.

    Exits with 0 when every fault was killed, no clean run was called broken and no kill of --against was lost, and
    with 1 otherwise.
    """
    require_hypothesis("ft prove")
    if engine not in ("processes", "ray"):
        raise UsageError(f"there is no engine {engine!r}", hint="choose processes or ray")
    from finetune.abilities import require_backend
    from finetune.verify.prove.baseline import lost_kills, read_baseline, write_proof
    from finetune.verify.prove.campaign import Campaign, Spread, chosen_faults, prove
    from finetune.verify.prove.kept import FILE, KeptRuns

    require_backend(backend)
    chosen = chosen_faults(fault or (), backend)
    if list_faults:
        _print_faults(chosen, as_json=json_output)
        return 0
    campaign = Campaign(tier, seeds, 0 if all_laws or against else 1, backend, times)
    baseline = read_baseline(against, campaign) if against else None
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is no folder", hint="name a new folder, or one of an earlier campaign")
    from finetune.processes import terminated_as_interrupted, usable_cores
    from finetune.report.matrix import render_matrix

    spread = Spread("ray" if engine == "ray" else "processes", jobs or usable_cores())
    kept = KeptRuns(output / FILE)
    if kept.dropped or len(kept):
        say(f"{output / FILE}: {len(kept)} runs are kept, {kept.dropped} are of other code or damaged and done again")
    with terminated_as_interrupted():
        found = prove(chosen, campaign, spread=spread, tell=say, kept=kept)
    lost = lost_kills(found, baseline) if baseline else []
    page = write_proof(found, output, render_matrix(found.as_dict()))
    if json_output:
        print_json(found.as_dict())
    else:
        _print(found)
        say(f"the kill matrix: {page}")
    for sentence in lost:
        say(f"LOST: {sentence}")
    return 0 if found.passes and not lost else 1


def _print_faults(chosen: "Sequence[Fault]", *, as_json: bool) -> None:
    if as_json:
        print_json([{"fault": each.id, "slug": each.slug, "stage": each.stage, "what": each.what} for each in chosen])
    else:
        print_data("\n".join(f"{each.id} {each.slug}: {each.what}" for each in chosen))


def _print(found: "Proof") -> None:
    from rich.table import Table

    from finetune.verify.prove.campaign import by_stage

    table = Table("stage", "killed", "of", box=None)
    for stage, (killed, count) in by_stage(found.results).items():
        table.add_row(stage, str(killed), str(count))
    data_console().print(table)
    for result in (each for each in found.results if each.status != "killed"):
        fault = result.fault
        beyond = f" (only tier {fault.tier} can see it)" if fault.tier > found.tier else ""
        reason = f" ({result.reason[:300]})" if result.reason else ""
        print_data(f"{result.status.upper()} {fault.id} {fault.slug} {fault.real}: {fault.what}{beyond}{reason}")
    for seed, laws in found.false_alarms.items():
        print_data(f"FALSE ALARM with seed {seed}: {', '.join(laws)}")
    if found.idle:
        print_data(f"killed no fault: {', '.join(found.idle)}")
    killed, of = len(found.of_status("killed")), len(found.results)
    print_data(f"tier {found.tier}: {killed} of {of} faults killed ({killed / of if of else 0.0:.1%})")
    print_data(
        f"{len(found.false_alarms)} of {len(found.clean)} clean runs called broken: with 95% confidence at most "
        f"{found.false_alarm_bound:.1%} of such runs are"
    )
